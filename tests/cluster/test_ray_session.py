"""How jobs reach Ray."""

import stat

from jaxcls.cluster.session import _keep_token


def test_the_token_is_its_owners_alone(tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    _keep_token(token)
    made = token.read_text()
    assert len(made) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    token.chmod(0o644)  # as Ray leaves it
    _keep_token(token)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() == made
