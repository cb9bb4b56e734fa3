"""Few-shot tasks from before/after pictures with video diffusion models, answered in real time."""

import logging

__version__ = "0.1.0"

# Where bitsandbytes is installed, PEFT imports it, and it tells of a faster kernel that it does not
# find, and at every step that int8 layers cast what they are given.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
