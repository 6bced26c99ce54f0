"""Names of a block's quantizer sites; params.yaml is checked with them, so torch is not imported here."""


def site_group(site: str) -> str:
    """The group of quantizer params a site belongs to: q_proj -> weights, mlp_input -> activations, key -> keys."""
    return {"key": "keys", "value": "values"}.get(site, "weights" if site.endswith("_proj") else "activations")
