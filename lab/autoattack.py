# SPDX-License-Identifier: MIT
"""AutoAttack, standard version: the worst case over APGD-CE, APGD-T, FAB-T and Square.

    from lab.autoattack import AUTO             # copied alone: from autoattack import AUTO
    x_adv = x.clone()                           # images in [0, 1]; the model is in eval mode
    for attack in AUTO.values():                # each attacks what the ones before have left
        robust = model(x_adv).argmax(1) == y
        x_adv[robust] = attack(model, x[robust], y[robust], eps=8 / 255)

Papers     APGD    Croce & Hein 2020, arXiv 2003.01690; its Sec. 5 is AutoAttack
           FAB     Croce & Hein 2020, arXiv 1907.02044
           Square  Andriushchenko et al. 2020, arXiv 1912.00049
Glossary   x (B, C, h, w) images in [0, 1], y (B,) labels, z (B, n_classes) logits,
           eps radius in pixel units, robust (B,) bool: not broken yet, i (b,) their indices
Result     x_adv, like x and detached: |x_adv - x|_inf <= eps, in [0, 1]. Misclassified images come
           back as they are. A broken image costs no further step or query.
Chance     Random numbers come from torch's global generator. FAB-T draws none.
"""
import warnings
from functools import partial, wraps

import torch
import torch.nn.functional as F


def attack(search):
    """search(model, x, y, eps, ...) with what all attacks share: checked input, a frozen model.

    ValueError for images (rounding by 1e-6 may stay) or eps outside [0, 1]. An empty batch calls no
    model. Within: eval mode, no gradients of weights; afterwards, also at an error, as before.
    """
    @torch.inference_mode(False)
    @wraps(search)
    def checked(model, x, y, eps, *args, **options):
        if not ((x >= -1e-6) & (x <= 1 + 1e-6)).all():
            raise ValueError("images must lie in [0, 1]; normalisation belongs inside the model")
        if not 0 <= eps <= 1:
            raise ValueError(f"eps {eps}: pixel units; 8/255, not 8")
        if len(x) == 0:
            return x.detach().clone()
        modes = [(module, module.training) for module in model.modules()]
        wishes = [(weight, weight.requires_grad) for weight in model.parameters()]
        try:
            model.eval().requires_grad_(False)
            return search(model, x.detach().clone(), y.clone(), eps, *args, **options)
        finally:
            for module, training in modes:
                module.training = training
            for weight, wants_gradient in wishes:
                weight.requires_grad_(wants_gradient)
    return checked


def finite_logits(model, x):
    """z = model(x), (B, n_classes).  FloatingPointError if a logit is not finite."""
    z = model(x)
    if not z.isfinite().all():
        raise FloatingPointError("the model returns logits that are not finite, so its accuracy "
                                 "means nothing")
    return z


@torch.no_grad()
def hits(model, x, y):
    """argmax_k z_k == y, (B,) bool: which images are classified correctly."""
    return finite_logits(model, x).argmax(1) == y


def differentiate(model, x, objective, *labels):
    """Logits z, values f = objective(z, *labels) (B,), and grad_x f like x; all detached.

    FloatingPointError if the gradient is not finite: the sign of a NaN would stop the attack.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z = finite_logits(model, x)
        f = objective(z, *labels)
        grad, = torch.autograd.grad(f.sum(), x)
    if not grad.isfinite().all():
        raise FloatingPointError("the attack met a gradient that is not finite")
    return z.detach(), f.detach(), grad


def target_classes(model, x, y, targets):
    """The classes but y, likeliest first: (targets, B), or (n_classes - 1, B) if that is less.

    ValueError if targets < 1.
    """
    if targets < 1:
        raise ValueError(f"a targeted attack needs at least 1 target class; got {targets}")
    with torch.no_grad():
        z = finite_logits(model, x).scatter(1, y[:, None], -torch.inf)
    return z.argsort(1, descending=True)[:, :min(targets, z.shape[1] - 1)].T


def margin(z, y):
    """z_y - max_{i != y} z_i, (B,): negative means misclassified.                 Square, Sec. 3"""
    return z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)


def difference(z, y, target):
    """z_t - z_y, (B,): positive where the target class beats the label.              FAB, Sec. 2"""
    return (z.gather(1, target[:, None]) - z.gather(1, y[:, None]))[:, 0]


def dlr(z, y, target=None):
    """(max_{i != y} z_i - z_y) / (z_(1) - z_(3)), difference of logits ratio.          APGD, Sec. 4

    z       (B, n_classes)  logits; z_(k) is the k-th largest
    target  (B,) or None    with it: (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)

    Returns (B,). Logits times 100 hide nothing.  ValueError with fewer than 3, or 4, classes.
    """
    need, kind = (3, "DLR") if target is None else (4, "targeted DLR")
    if z.shape[1] < need:
        raise ValueError(f"the {kind} loss needs at least {need} classes; got {z.shape[1]}")
    top = z.topk(need, 1).values                                            # (B, 3) or (B, 4)
    if target is None:
        return -margin(z, y) / (top[:, 0] - top[:, 2] + 1e-12)
    return difference(z, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


# ---- APGD: gradient ascent that adapts its step --------------------------------------------------

def checkpoints(steps):
    """ceil(p_j steps), p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06).

    APGD, Sec. 3
    """
    marks = []
    percent = gap = 22                                                      # whole numbers: exact
    while percent <= 100:
        marks.append(-(-percent * steps // 100))
        gap = max(gap - 3, 6)
        percent += gap
    return marks


def evaluate(model, point, robust, objective, y, *target):
    """Gradient (B, C, h, w) and loss (B,) at point, of the images that were robust until now.

    A broken image has loss inf, so that the point that broke it stays its best.
    """
    grad = torch.zeros_like(point)
    value = point.new_full((len(point),), torch.inf)
    i = robust.nonzero()[:, 0]
    if len(i):
        z, f, grad[i] = differentiate(model, point[i], objective, y[i], *(t[i] for t in target))
        value[i] = f.where(z.argmax(1) == y[i], torch.inf)
    return grad, value


@attack
def apgd(model, x, y, eps, steps=100, loss="ce", target=None):
    """max loss(x') over the ball: projected ascent, momentum, an adaptive step.   APGD, Algorithm 1

    steps   int           gradient steps, from one uniform random start
    loss    str           "ce" | "dlr"
    target  (B,) or None  classes to move to, with loss "dlr"

    Returns the point that broke an image, else its best.  ValueError on another loss, or a target
    with "ce".
    """
    if loss not in ("ce", "dlr") or (loss == "ce" and target is not None):
        raise ValueError(f"loss is 'ce', or 'dlr' with or without a target; got {loss!r}"
                         + ("" if target is None else " with a target"))
    objective = dlr if loss == "dlr" else partial(F.cross_entropy, reduction="none")
    labels = [y] if target is None else [y, target]
    low = (x - eps).clamp(min=0)
    high = (x + eps).clamp(max=1)
    # 1. Start at a random point of the ball, with step 2 eps. Misclassified images stay at x.
    robust = hits(model, x, y)
    point = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(low, high)
    point[~robust] = x[~robust]
    grad, value = evaluate(model, point, robust, objective, *labels)
    still = (grad == 0).flatten(1).all(1) & robust
    if loss == "ce" and still.sum() > 0.1 * robust.sum():
        warnings.warn(f"{int(still.sum())} of {int(robust.sum())} images have a gradient of "
                      "exactly 0, which moves nothing and proves no robustness", stacklevel=4)
    best_point, best_grad, best_value = point.clone(), grad.clone(), value.clone()
    point_before = point
    alpha = torch.full_like(x[:, :1, :1, :1], 2 * eps)                      # (B, 1, 1, 1)
    # Since the last checkpoint, at step mark: was alpha halved there, how many steps raised the
    # loss, did the best loss improve? Nothing can stall before the first, so halved begins as True.
    mark = 0
    halved = torch.ones_like(robust)
    rises = torch.zeros_like(y)
    improved = torch.zeros_like(robust)
    for k in range(1, steps + 1):
        robust = best_value < torch.inf
        if not robust.any():
            break
        # 2. Take .75 of a projected gradient step and .25 of the last move; project again.
        share = 0.75 if k > 1 else 1.0
        step = (point + alpha * grad.sign()).clamp(low, high) - point
        ahead = point + share * step + (1 - share) * (point - point_before)
        point_before = point
        value_before = value
        point = ahead.clamp(low, high)
        grad, value = evaluate(model, point, robust, objective, *labels)
        # 3. Keep the best point, with its gradient and loss.
        better = value > best_value
        best_point[better] = point[better]
        best_grad[better] = grad[better]
        best_value[better] = value[better]
        rises += value > value_before
        improved |= better
        # 4. At a checkpoint, halve alpha and go back to the best point if fewer than .75 of the
        #    steps raised the loss, or if neither alpha nor the best loss is new.
        if k in checkpoints(steps):
            halved = (rises < 0.75 * (k - mark)) | (~halved & ~improved)
            alpha[halved] /= 2
            point[halved] = best_point[halved]
            grad[halved] = best_grad[halved]
            value[halved] = best_value[halved]
            mark = k
            rises.zero_()
            improved.zero_()
    return best_point


def apgd_ce(model, x, y, eps, steps=100):
    """APGD on the cross-entropy.                                                    APGD, Sec. 5"""
    return apgd(model, x, y, eps, steps)


@attack
def apgd_t(model, x, y, eps, targets=9, steps=100):
    """APGD on the targeted DLR loss, one class after another, likeliest first.         APGD, Sec. 5

    targets  int  classes to try, capped at n_classes - 1
    steps    int  gradient steps for each of them
    """
    x_adv = x.clone()
    robust = hits(model, x, y)
    for target in target_classes(model, x, y, targets):
        i = robust.nonzero()[:, 0]
        if len(i):
            x_adv[i] = apgd(model, x[i], y[i], eps, steps, "dlr", target[i])
            robust[i] = hits(model, x_adv[i], y[i])
    return x_adv


# ---- FAB: the nearest point beyond a decision boundary, linearised again and again ---------------

def project(x, w, c):
    """argmin |d|_inf over d with <w, d> = c and x + d in [0, 1]^n.                      FAB, Sec. 2

    x, w  (B, n)  points of the box, normals of the hyperplanes
    c     (B,)    what <w, d> has to reach

    Returns d (B, n); where box and hyperplane do not meet, the d that comes closest.
    Each pixel moves to the side that helps, by r, or by room_i if its bound is nearer. That gives
    g(r) = sum_i |w_i| min(r, room_i), which is linear between sorted rooms. We solve g(r) = |c|.
    """
    side = w.sign() * c.sign()[:, None]                                     # (B, n)
    goal = c.abs()[:, None]                                                 # (B, 1)
    room = torch.where(side > 0, 1 - x, x)
    knot, order = room.sort(1)
    w = w.abs().gather(1, order)
    # Up to knot k, g(r) = full_k + slope_k r: the pixels before k are at their bounds and give
    # full_k. The others still move; slope_k is the sum of their |w|.
    full = (w * knot).cumsum(1) - w * knot
    slope = w.flip(1).cumsum(1).flip(1)
    # As many knots as fall short of the goal come before the piece that reaches it. If all do, r
    # exceeds all rooms, and every pixel ends at its bound.
    k = (full + slope * knot < goal).sum(1, keepdim=True).clamp(max=x.shape[1] - 1)
    r = (goal - full.gather(1, k)) / slope.gather(1, k).clamp(min=torch.finfo(x.dtype).tiny)
    return side * torch.minimum(r, room)


def fab_step(x_i, x, f, w, alpha_max=0.1, eta=1.05):
    """(1 - a) (x_i + eta d_i) + a (x + eta d), clamped to [0, 1].                  FAB, Algorithm 1

    x_i, x     (B, C, h, w)        current and original images
    f, w       (B,), (B, C, h, w)  the hyperplane of all x' with f + <w, x' - x_i> = 0
    alpha_max  float               a = min(|d_i| / (|d_i| + |d|), alpha_max) draws towards x
    eta        float               overshoot; 1 would end on the hyperplane

    d_i and d are the shortest ways from x_i and x to the hyperplane.
    """
    u = x_i.flatten(1)                                                      # (B, n)
    v = x.flatten(1)
    w = w.flatten(1)
    d_i = project(u, w, -f)
    d = project(v, w, -f - (w * (v - u)).sum(1))
    far_i = d_i.abs().amax(1, keepdim=True)                                 # (B, 1)
    far = d.abs().amax(1, keepdim=True)
    a = (far_i / (far_i + far).clamp(min=1e-8)).clamp(max=alpha_max)
    return ((1 - a) * (u + eta * d_i) + a * (v + eta * d)).clamp(0, 1).view_as(x)


@attack
def fab_t(model, x, y, eps, targets=9, steps=100, beta=0.9):
    """min |x' - x|_inf over misclassified x', z_t - z_y linearised at each step.        FAB, Sec. 2

    targets, steps  int    as apgd_t; no random start
    beta            float  after a misclassified x' the next step starts at x + beta (x' - x)

    An image is done when the distance falls to eps: how far it falls below is not asked.
    """
    x_adv = x.clone()
    robust = hits(model, x, y)
    for target in target_classes(model, x, y, targets):
        point = x.clone()
        for _ in range(steps):
            i = robust.nonzero()[:, 0]
            if len(i) == 0:
                return x_adv
            _, f, w = differentiate(model, point[i], difference, y[i], target[i])
            new = fab_step(point[i], x[i], f, w)
            wrong = ~hits(model, new, y[i])
            # A misclassified point within eps is a result. One beyond eps is drawn towards x.
            found = wrong & ((new - x[i]).abs().flatten(1).amax(1) <= eps)
            x_adv[i[found]] = new[found]
            robust[i[found]] = False
            point[i] = new
            back = i[wrong]
            point[back] = x[back] + beta * (new[wrong] - x[back])
    return x_adv


# ---- Square: random search, by logits alone ------------------------------------------------------

def random_signs(x, *shape):
    """-1 or 1, each with probability 1/2, of x's type and on its device."""
    return 2 * torch.randint(2, shape, device=x.device, dtype=x.dtype) - 1


def random_squares(x, side):
    """A mask (B, 1, h, w): in each image of x, True on one square at a random place."""
    B, _, h, w = x.shape
    top = torch.randint(h - side + 1, (B, 1, 1, 1), device=x.device)
    left = torch.randint(w - side + 1, (B, 1, 1, 1), device=x.device)
    row = torch.arange(h, device=x.device)[:, None]                         # (h, 1)
    column = torch.arange(w, device=x.device)                               # (w,)
    return (top <= row) & (row < top + side) & (left <= column) & (column < left + side)


@attack
def square(model, x, y, eps, queries=5000, span=10_000):
    """min margin by random search: +-2 eps on a square, kept if better.     Square, Algorithms 1, 2

    queries  int  proposals for each image; the start, vertical stripes x +- eps, is one more
    span     int  the square covers .8 of the image at first; span proposals halve its area nine
                  times. AutoAttack makes 5000 out of a span of 10,000.
    """
    B, C, h, w = x.shape
    low = (x - eps).clamp(min=0)
    high = (x + eps).clamp(max=1)
    halvings = [at * span / 10_000 for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)]
    with torch.no_grad():
        stripes = (x + eps * random_signs(x, B, C, 1, w)).clamp(low, high)
        x_adv = torch.where(hits(model, x, y)[:, None, None, None], stripes, x)
        worst = margin(finite_logits(model, x_adv), y)                      # (B,)
        for query in range(queries):
            i = (worst >= 0).nonzero()[:, 0]
            if len(i) == 0:
                break
            area = 0.8 / 2 ** sum(query > at for at in halvings) * h * w
            side = min(max(round(area ** 0.5), 1), h, w)
            mask = random_squares(x[i], side)                               # (b, 1, h, w)
            change = 2 * eps * random_signs(x, len(i), C, 1, 1) * mask      # (b, C, h, w)
            new = (x_adv[i] + change).clamp(low[i], high[i])
            value = margin(finite_logits(model, new), y[i])
            better = value < worst[i]
            x_adv[i[better]] = new[better]
            worst[i[better]] = value[better]
    return x_adv


AUTO = {"apgd-ce": apgd_ce, "apgd-t": apgd_t, "fab-t": fab_t, "square": square}
ENSEMBLES = {"aa": tuple(AUTO), "aa-fast": ("apgd-ce", "apgd-t")}           # in this order
