#!/usr/bin/env python3
"""`wrn-timm detect` in a checkout."""
import sys

from wrn_timm.cli import command

main = command('detect')
if __name__ == '__main__':
    sys.exit(main())
