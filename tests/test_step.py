"""The step against numpy: EMA with warm-up, the owners of parameters."""

import jax
import numpy as np
import pytest
import tiny

from dcae_jax import tree
from dcae_jax.config import EmaConfig
from dcae_jax.errors import UserError
from dcae_jax.step import ema_name
from dcae_jax.tasks.autoencode import Phase


def test_ema_is_the_published_recursion_with_its_warm_up():
    """e += (1 - d (1 - exp(-(k + 1) / tau))) (p - e), in float64, for two decays."""
    cfg = tiny.run()
    cfg.ema = EmaConfig(decays=(0.9, 0.5), warmup_steps=2.0)
    trainer = tiny.Trainer(cfg)
    path = "ae/decoder/conv_out/kernel"
    p = np.float64(tree.flatten(jax.device_get(trainer.state.params))[path])
    expected = dict.fromkeys(cfg.ema.decays, p)
    for k in range(3):
        trainer.train(1, first=k)
        p = np.float64(tree.flatten(jax.device_get(trainer.state.params))[path])
        for d, e in expected.items():
            warm = d * (1 - np.exp(-(k + 1) / 2.0))
            expected[d] = e + (1 - warm) * (p - e)
    for d, e in expected.items():
        found = tree.flatten(jax.device_get(trainer.state.ema[ema_name(d)]["params"]))[path]
        # f32 against float64: three roundings of values below 1.
        np.testing.assert_allclose(found, e, atol=3e-7)
        assert np.abs(found - p).max() > 1e-5  # it is an average, not the last value


def test_two_players_may_not_own_one_parameter():
    cfg = tiny.run(Phase.low_res_local)
    cfg.task.trainable = ".*"
    with pytest.raises(UserError, match="is trained by both 'ae' and 'disc'"):
        tiny.Trainer(cfg)
