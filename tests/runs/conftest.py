import sys
from pathlib import Path

# Helpers beside the tests are imported by name, whichever way pytest imports the tests themselves.
sys.path.insert(0, str(Path(__file__).parent))
