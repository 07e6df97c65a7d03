"""The checks of `benchmarks gpu` accept the CUDA kernels, which run on the host here."""

from longvq_layers.benchmarks.gpu import checks


def test_the_kernels_pass_its_checks(on_host):
    assert "vq_attention dk " in checks.run("cpu", count=2, namespace=on_host)
