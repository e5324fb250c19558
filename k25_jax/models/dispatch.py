"""Token copies a round at a time, and their way to the devices that hold their experts: all-to-all (K2.5 §3.8).

Beside it stands the gather of models/experts.py. Of T tokens a device, D wide, K copies each, over n devices that share out
the experts, forward and backward pass under remat send for each device and layer

    gather      5 (n - 1) T D               x twice and dy gathered, y and dx added up (without remat 4: x is kept)
    all-to-all  5 ROOM K (n - 1) / n T D    x twice and dy there, y and dx back

so that all-to-all sends less where n > ROOM K. With K = 8 and ROOM = 1.25 that is 1.6 times less over 16 devices, and 1.25
times more over 8. It never holds the tokens of all n devices. What the gather sends does not depend on the router; here a
busy expert costs rounds, each as long as the first: n / ROOM of them, were all tokens to choose one expert.
"""

import functools
import math

import jax
import jax.numpy as jnp

AXIS = "expert"


def exchanged(layer, places: int, p, x_TD, weights_TK, experts_TK):
    """What the chosen experts, on whichever device of the `expert` axis, make of this device's tokens: [T,D]; dropless.

    `layer(p, x_ND, weights_N1, number_N1, load_E)` is what one device makes of rows for its own experts, p; their number
    is the number of own experts where a row is empty. `experts_TK` is at least the number of all experts where nothing is
    chosen. In a round every device has `places` for each other one, and as many rounds run as the fullest pair needs,
    usually one.
    """
    rounds = functools.partial(_exchanges, layer, places, p["gate"].shape[0])
    return in_rounds(rounds, p, x_TD, weights_TK, experts_TK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_rounds(rounds, p, x_TD, weights_TK, choice):
    """The weighted results of token copies, added up by token in float32, a round of copies at a time: [T,D].

    `rounds(choice)` is (how many; round(i) -> (a function of weights p, rows and router weights to results; the token
    and the copy of each row)). Memory is held for one round: the backward pass computes each again.
    """
    count, one_round = rounds(choice)

    def add(i, y_TD):
        function, token_N, slot_N = one_round(i)
        return y_TD.at[token_N].add(function(p, x_TD[token_N], weights_TK.reshape(-1)[slot_N]))

    return jax.lax.fori_loop(0, count, add, jnp.zeros(x_TD.shape, jnp.float32)).astype(x_TD.dtype)


def _forward(rounds, *arguments):
    return in_rounds(rounds, *arguments), arguments


def _backward(rounds, arguments, dy_TD):
    p, x_TD, weights_TK, choice = arguments
    count, one_round = rounds(choice)

    def add(i, carry):
        dp, dx_TD, dweights_N = carry
        function, token_N, slot_N = one_round(i)
        y_ND, pull = jax.vjp(function, p, x_TD[token_N], weights_TK.reshape(-1)[slot_N])
        dp_here, dx_ND, dw_N = pull(dy_TD[token_N].astype(y_ND.dtype))
        dp = jax.tree.map(jnp.add, dp, dp_here)
        return dp, dx_TD.at[token_N].add(dx_ND), dweights_N.at[slot_N].add(dw_N)

    like = p, x_TD, weights_TK.reshape(-1)
    sums = jax.lax.fori_loop(0, count, add, jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), like))
    dp, dx_TD, dweights_N = jax.tree.map(lambda total, a: total.astype(a.dtype), sums, like)
    return dp, dx_TD, dweights_N.reshape(weights_TK.shape), None


in_rounds.defvjp(_forward, _backward)


def places_for(copies: int, devices: int, room: float) -> int:
    """Places in a round for one device's copies for another: `room` times the mean, or all copies if they are few."""
    return min(copies, 8 * math.ceil(room * copies / devices / 8))


def _exchanges(layer, places: int, own: int, experts_TK):
    """The rounds of `exchanged`, for a device with `own` experts."""
    devices = jax.lax.axis_size(AXIS)
    experts_N, copies = experts_TK.reshape(-1), experts_TK.shape[1]
    order_N = jnp.argsort(experts_N, stable=True)  # by expert, so by device too
    count_Z = jnp.bincount(experts_N // own, length=devices)
    start_Z1 = (jnp.cumsum(count_Z) - count_Z)[:, None]
    swap = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)

    def one_round(j):
        place_ZU = j * places + jnp.arange(places)[None]
        used_N = (place_ZU < count_Z[:, None]).reshape(-1)
        slot_N = order_N[jnp.minimum(start_Z1 + place_ZU, len(order_N) - 1).reshape(-1)]
        number_N1 = swap(jnp.where(used_N, experts_N[slot_N] % own, own))[:, None]
        load_E = jnp.bincount(number_N1[:, 0], length=own)

        def function(p, x_ND, w_N):
            x_ND = swap(jnp.where(used_N[:, None], x_ND, 0))
            y_ND = swap(layer(p, x_ND, swap(w_N)[:, None], number_N1, load_E))
            return jnp.where(used_N[:, None], y_ND, 0)

        return function, slot_N // copies, slot_N

    return jax.lax.pmax(-(-count_Z.max() // places), AXIS), one_round
