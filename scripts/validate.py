#!/usr/bin/env python3
"""`wrn-timm validate` in a checkout."""
import sys

from wrn_timm.cli import command

main = command('validate')
if __name__ == '__main__':
    sys.exit(main())
