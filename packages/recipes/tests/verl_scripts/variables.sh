#!/usr/bin/env bash
A=1 B=$HOME/x
C="${A}_${B}" # text
export D=${D:-default} E=${GIVEN:-no} F=${EMPTY:-was empty} G=${EMPTY-}
H=${X:=set}; I=${A:+_${A}}${NOPE:+no}
J+=a; J+=b
python3 -m verl.trainer.main_ppo a.a=$A a.b=$B a.c=$C a.d=$D a.e="$E" a.f="$F" a.g=$G a.h=$H$X a.i=$I a.j=$J a.k=${NGPUS:-${GPUS:-8}} a.l=~/x
