"The front door under the name it had in the first edition; new code says `from diffclip_da import adapt_folder`."
import sys

from diffclip_da.adaptation.adapter import *
from diffclip_da.adaptation.folder import *
from diffclip_da.adaptation.folder import main

if __name__ == '__main__': sys.exit(main())
