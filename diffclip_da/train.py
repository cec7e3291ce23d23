"The training of a U-Net under the name it had in the first edition; new code says `diffclip_da.models.train`."
import sys

from diffclip_da.models.train import *
from diffclip_da.models.train import main

if __name__ == '__main__': sys.exit(main())
