"""Products of grouped rows with frozen weights of experts: each tile of rows is multiplied by the weight of its expert.

`groups` sorts rows by expert and puts results back, `api` holds the op, its gradient and the choice among its
implementations. `experts` reads one expert of any kind of stack, and loops over them on every device; `mosaic` runs on
NVIDIA cards.
"""

from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from pallas_kernels.grouped_matmul.groups import Groups as Groups
from pallas_kernels.grouped_matmul.groups import combine_rows as combine_rows
from pallas_kernels.grouped_matmul.groups import gather_rows as gather_rows
from pallas_kernels.grouped_matmul.groups import group_rows as group_rows
from pallas_kernels.grouped_matmul.groups import rows_of_pairs as rows_of_pairs
from pallas_kernels.grouped_matmul.groups import weights_of_slots as weights_of_slots
