"""Float64 oracles, written from the paper's equations with full SVDs and nothing of the package."""

import numpy as np
import torch


def capture_inputs(model, names, batches):
    """Return {name: X (d_in, N)} in float64: what each named linear reads, padding excluded, one hook each; no logits."""
    seen = {name: [] for name in names}
    mask = None
    handles = []
    for name in names:
        module = model.get_submodule(name)

        def hook(_, args, name=name):
            rows = args[0].reshape(-1, args[0].shape[-1])[mask]
            seen[name].append(rows.double().cpu().numpy().T)

        handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"].bool().flatten()
            model.base_model(**batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(columns, axis=1) for name, columns in seen.items()}


def null_space(X, r):
    """Return the r left singular vectors of X with the smallest singular values (paper, section 3.3)."""
    if X.shape[1] > X.shape[0]:  # X = R Q: R has the same left singular vectors, in half the time
        X = np.linalg.qr(X.T, mode="r").T
    U, _, _ = np.linalg.svd(X)
    return U[:, -r:]


def projection(W, X, r):
    """Return T = W U Uᵀ by the full product."""
    U = null_space(X, r)
    return W @ U @ U.T


def factors(T, r, s):
    """Return A0 and B0 from the full SVD of T, signs as they fall."""
    P, S, Vh = np.linalg.svd(T)
    root = np.sqrt(S[:r] / s)
    return root[:, None] * Vh[:r], P[:, :r] * root


def leak(A, X):
    """Return ‖A X‖ / (‖A‖ ‖X‖)."""
    return np.linalg.norm(A @ X) / (np.linalg.norm(A) * np.linalg.norm(X))
