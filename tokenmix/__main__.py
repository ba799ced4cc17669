import sys

from tokenmix.cli import main

sys.exit(main())
