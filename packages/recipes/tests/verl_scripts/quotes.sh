#!/usr/bin/env bash
python3 -m verl.trainer.main_ppo trainer.logger=['console','wandb'] a.b='["x","y"]' c.d="q \"r\" $GIVEN" e.f=\'x\' g.h=$'a\tb' \
        i.j="a"'b'c k.l= m.n="" 'o.p=q r' s.t=\[x\] u.v='it'\''s'
