#!/usr/bin/env bash
if [ "$GIVEN" = "from outside" ] && [ -z "$EMPTY" ]; then A=1; elif true; then A=2; else A=3; fi
if [[ "$GIVEN" == from* && ! -n "$NOTHING" ]]; then B=1; else B=2; fi
[ 3 -gt 2 ] && C=yes || C=no
[ -d /usr ] && D=there; [ ! -f /no/such/file ] && E=missing
[[ $GIVEN =~ ^from ]] && F=matches
(( 3 > 2 )) && G=more
if ! test -n "$EMPTY"; then H=h; fi
case "$GIVEN" in other) I=1 ;; from*|x) I=2 ;; *) I=3 ;; esac
case x in y) J=1;; *) J=2;; esac
python3 -m verl.trainer.main_ppo $A $B $C $D $E $F $G $H $I $J
