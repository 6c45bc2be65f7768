"""Prints the shell commands of one fenced block of README.md, so that CI runs what people read.

Usage: python .ci/readme.py NAME, for the block that follows the line `<!-- ci: NAME -->`.
"""

import re
import sys
from pathlib import Path

name = sys.argv[1]
text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
blocks = re.findall(rf"<!-- ci: {re.escape(name)} -->\s*```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
if len(blocks) != 1:
    sys.exit(f"README.md has {len(blocks)} blocks after '<!-- ci: {name} -->', expected one")
print(blocks[0], end="")
