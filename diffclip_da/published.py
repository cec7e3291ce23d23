"Published weights under the name they had in the first edition; new code says `diffclip_da.models.published`."
from diffclip_da.models.published import *
