# SPDX-License-Identifier: MIT
"""The paper's argument as five facts, P1 to P5, each a function that tests prove exact.

The paper argues that adversarial training has little to turn in a pure SSM, that the error of a
data-dependent SSM can explode, and that attention and AdS hold it back. We state the argument as
five facts (derived here). `python train.py --analyse` measures them on a trained model.

P1  fixed map: a perturbation does to it at most its gain ||K||_1, whatever the input is
P2  fixed map: its parameters bound the gain from above, its response to a signal from below
P3  Mamba: the error is as large as the stored state; it grows linearly, never exponentially
P4  attention: the error stays below the range of the values
P5  AdS: the error is the sum of three terms, and ReLU can remove it exactly

Glossary   u, y  input and output of a map (B, L, H); du, dy  their perturbations
           ', _adv  attacked; in A', B': discretised; |.|_inf  the largest absolute entry
           K  kernel with D in K_0, K_hat  its Fourier transform
All in float64.
"""
import torch
import torch.nn.functional as F

from attention_adv import EMA
from s4_adv import DSS, S4, S5


# --------------------------------------------------------------------------------------------------
# P1. A fixed map answers a perturbation by dy = K * du, whatever u is. The worst du has the signs
#     of the kernel, so the gain, the largest |dy| for |du| <= 1, is the kernel's l1 norm.
# --------------------------------------------------------------------------------------------------

def kernel(ssm, L):
    """K of S4, DSS (H, L); of S5 (L, H, H), K_l = Re(C A'^l B'); of EMA (H, 2L). D is in K_0."""
    if not isinstance(ssm, S5):
        return ssm.kernel(L)
    A, B, C = ssm.matrices()
    powers = A ** torch.arange(L, device=A.device)[:, None]                 # (L, P)
    K = torch.einsum("hp,lp,pi->lhi", C, powers, B).real                    # (L, H, H)
    return torch.cat([K[:1] + torch.diag(ssm.D), K[1:]])


def gain(ssm, L):
    """gain_i = max |dy_i|_inf over |du|_inf <= 1 = sum_s sum_j |(K_s)_ij|.        Derived here, P1

    ssm  S4 | DSS | S5 | EMA                                    L  int  tokens

    |dy_ti| <= sum_{s <= t} sum_j |(K_s)_ij| |du_{t-s,j}| is largest at t = L-1, and an equality for
    du_{L-1-s,j} = sign (K_s)_ij. In S4, DSS and EMA K_s is diagonal. The EMA looks ahead, too: an
    output t sees the lags t-L+1 .. t, and the worst t is where their sum is largest.
    Returns the gain (H,), and du: (1, L, H), of S5 (H, L, H), one for each channel i.
    """
    K = kernel(ssm, L)
    if isinstance(ssm, S5):
        return K.abs().sum((0, 2)), K.sign().flip(0).transpose(0, 1)
    if not isinstance(ssm, EMA):
        return K.abs().sum(1), K.sign().T.flip(0)[None]
    back = K.abs()[:, :L].cumsum(1)                                         # of lags 0 .. t
    ahead = F.pad(K.abs()[:, L:].flip(1).cumsum(1)[:, :-1], (1, 0))         # of lags -1 .. -t
    largest, t = (back + ahead.flip(1)).max(1)                              # (H,)
    lags = (t[:, None] - torch.arange(L, device=t.device)) % (2 * L)        # (H, L)
    return largest, K.sign().gather(1, lags).T[None]


# --------------------------------------------------------------------------------------------------
# P2. The same kernel answers the signal. No frequency passes with more than the gain, so a smaller
#     error means a smaller signal; and the modes, fixed by the parameters, bound the gain above.
# --------------------------------------------------------------------------------------------------

def modes(ssm, L):
    """g and rho with |K_l| <= sum_n g_n rho_n^l for l >= 1, D apart; each (H, n).

    The modes are the eigenvalues, but of S4: its A is far from normal, so that the condition of the
    eigenvectors would enter. There |K_l| <= |C| |A'|_2^l |B'|, and |A'|_2 < 1 since A + A* < 0.
    """
    if isinstance(ssm, S4):
        A, B, C = ssm.discrete(L)
        g = C.norm(dim=1) * B.norm(dim=1)
        return g[:, None], torch.linalg.matrix_norm(A, 2)[:, None]
    if isinstance(ssm, DSS):
        lam_dt, C = ssm.matrices(L)
        return C.abs(), lam_dt.exp().abs()
    if isinstance(ssm, S5):
        A, B, C = ssm.matrices()
        return C.abs() * B.abs().sum(1), A.abs()                            # of row i of K_l
    log_q, c = ssm.matrices()                                               # (2H, N), two sides
    g = torch.cat(c.abs().chunk(2), 1)                                      # (H, 2N)
    return g, torch.cat(log_q.exp().chunk(2), 1)


def gain_bounds(ssm, L):
    """sup_w sum_j |K_hat_ij(w)| <= ||K||_1 <= |D_i| + sum_n g_in (1 - rho_n^L) / (1 - rho_n).

    Arguments as gain. Returns both ends (H,); w on the 2L-th roots of 1.         Derived here, P2

    Left: |K_hat(w)| = |sum_s K_s e^{-iws}| <= sum_s |K_s|. Right: `modes`, a geometric sum.
    The ends can lie apart by as much as sqrt(L) (Parseval and Cauchy-Schwarz). ||K||_1 is the gain;
    of EMA it takes all 2L - 1 lags, of which one output sees L.
    """
    K = kernel(ssm, L)
    if isinstance(ssm, S5):
        spectral = torch.fft.rfft(K, 2 * L, 0).abs().sum(2).amax(0)
    else:
        spectral = torch.fft.rfft(K, 2 * L).abs().amax(1)
    g, rho = modes(ssm, L)
    skip = ssm.omega if isinstance(ssm, EMA) else ssm.D
    return spectral, skip.abs() + (g * (1 - rho ** L) / (1 - rho)).sum(1)


# --------------------------------------------------------------------------------------------------
# P3. Mamba selects A' and B' by its input, so an attack moves them, too: the error then takes a
#     part of the stored state along. The weights give no bound, but |A'| < 1 forbids explosion.
# --------------------------------------------------------------------------------------------------

def scan_errors(clean, attacked, A, h=0.0):
    """e_t = h'_t - h_t = a'_t e_{t-1} + (a'_t - a_t) h_{t-1} + (b'_t - b_t).      Derived here, P3

    clean, attacked  (u, dt, B)  what the scan is fed, as in mamba_adv.selective_scan_loop
    A                (d, N)      negative
    h                float       every state before the first step, in both

    with a_t = e^{dt_t A}, b_t = dt_t u_t B_t. Yields h_t, h'_t, each from its own recurrence, and
    the three terms, all (b, d, N), for t = 1, 2, ...
    With fixed parameters the second term is 0. Here it is as large as the stored state. Since
    0 < a'_t < 1, |e_t| <= sum_{k <= t} (|second| + |third|): linear in the state and in t.
    """
    def decays_and_inputs(u, dt, B):
        for u_t, dt_t, B_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1)):
            yield torch.exp(dt_t[..., None] * A), (dt_t * u_t)[..., None] * B_t[:, None]
    h = torch.full_like(A, h).expand(len(clean[0]), -1, -1)                 # (b, d, N)
    h_adv = h
    for (a, b), (a_adv, b_adv) in zip(decays_and_inputs(*clean), decays_and_inputs(*attacked)):
        carried = a_adv * (h_adv - h)
        stored = (a_adv - a) * h
        fed = b_adv - b
        h = a * h + b
        h_adv = a_adv * h_adv + b_adv
        yield h, h_adv, carried, stored, fed


def local_gain(layer, u, outputs):
    """sum_{s,j} |dy_{L,i} / du_{s,j}|: the gain near u of the last token.         Derived here, P3

    layer  function  (B, L, H) -> (B, L, H')         outputs  indices i

    Returns (B, len(outputs)). To first order |dy_i| <= this |du|_inf, reached by the signs of the
    derivative; of a layer with fixed parameters it is the gain, whatever u is.
    """
    gains = []
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        y = layer(u)[:, -1].sum(0)                                          # images do not mix
        for i in outputs:
            slope, = torch.autograd.grad(y[i], u, retain_graph=True)
            gains.append(slope.abs().sum((1, 2)))
    return torch.stack(gains, 1)


# --------------------------------------------------------------------------------------------------
# P4. Attention averages its values. However far an attack moves the scores, the result stays among
#     the values: what the scores do is at most the range of the values.
# --------------------------------------------------------------------------------------------------

def attention_error(P, V, P_adv, V_adv):
    """|P'V' - PV| <= max_s |V'_s - V_s| + TV(P', P) osc(V).                       Derived here, P4

    P, P_adv  (B, L, L)  probabilities in rows, clean and attacked
    V, V_adv  (B, L, d)  values

    P'V' - PV = P'(V' - V) + (P' - P)(V - m): P' - P has rows of sum 0, so any m per channel may go.
    With m in the middle of V's range the last is at most |P' - P|_1 / 2 = TV times the range, osc.
    Returns |P'V' - PV| and its bound (B, L, d), TV (B, L, 1) <= 1, osc (B, 1, d).
    """
    tv = (P_adv - P).abs().sum(-1, keepdim=True) / 2
    osc = V.amax(1, keepdim=True) - V.amin(1, keepdim=True)
    bound = (V_adv - V).abs().amax(1, keepdim=True) + tv * osc
    return (P_adv @ V_adv - P @ V).abs(), bound, tv, osc


# --------------------------------------------------------------------------------------------------
# P5. AdS scales the error, and adds what the attack does to scale and shift. ReLU sets scale and
#     shift to 0 where both pre-activations are negative: there nothing is left of the error.
# --------------------------------------------------------------------------------------------------

def error_parts(ads, y, y_adv):
    """AdS(y') - AdS(y) = s' (y' - y) + (s' - s) y + (t' - t), term by term.       Derived here, P5

    ads  ads.AdaptiveScaling        y, y_adv  (..., d_model)  clean and attacked input

    Returns the error scaled, the clean y rescaled, the shift's change, each (..., d_model); and
    where nothing is left of the error, since s, s', t and t' are all 0, bool (..., d_model).
    """
    s, t = ads.scale_and_shift(y)
    s_adv, t_adv = ads.scale_and_shift(y_adv)
    removed = (s == 0) & (s_adv == 0) & (t == 0) & (t_adv == 0)
    return s_adv * (y_adv - y), (s_adv - s) * y, t_adv - t, removed
