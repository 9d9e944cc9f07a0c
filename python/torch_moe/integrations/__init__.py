"""torch-moe inside other libraries. Nothing here is imported, and no other library touched, by ``import torch_moe``."""
