#!/usr/bin/env python3
"""`wrn-timm publish` in a checkout."""
import sys

from wrn_timm.cli import command

main = command('publish')
if __name__ == '__main__':
    sys.exit(main())
