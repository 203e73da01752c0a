#!/usr/bin/env python3
"""`wrn-timm finetune` in a checkout."""
import sys

from wrn_timm.cli import command

main = command('finetune')
if __name__ == '__main__':
    sys.exit(main())
