from enum import Enum

class KVCacheLayout(Enum):
    LBHNC = ...
