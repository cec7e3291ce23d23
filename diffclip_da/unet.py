"The network under the name it had in the first edition; new code says `diffclip_da.models.unet` and `load_unet`."
from diffclip_da.models.load import load_unet
from diffclip_da.models.unet import *
