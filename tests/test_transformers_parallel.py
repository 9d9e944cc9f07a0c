"""transformers' own expert and tensor parallelism over our experts, on two processes: the model of one."""

import pytest
from ranks import needs_distributed, run_ranks

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'torch-moe[transformers]')")

pytestmark = needs_distributed


@pytest.mark.parametrize(("family", "kind"), [("mixtral", "ep"), ("mixtral", "tp"), ("deepseek_v3", "ep")])
def test_the_model_of_one_process(family, kind, tmp_path):
    run_ranks("transformers_parallel.py", 2, tmp_path, family, kind)
