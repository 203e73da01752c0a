#!/usr/bin/env python3
"""Run `wrn-timm detect` from a checkout."""
import sys

from wrn_timm.cli import command

main = command('detect')
if __name__ == '__main__':
    sys.exit(main())
