"""The two genres with a wide vocabulary: inventories and notices to the staff. They teach the model ordinary words."""

from random import Random
from typing import NamedTuple

from tools.pocket.grammar import Facts, fill, invent
from tools.pocket.words import words


class Kind(NamedTuple):
    """Things, what they may be like, and what may be done with them."""

    adjectives: tuple[str, ...]
    things: tuple[str, ...]
    verbs: tuple[str, ...]


GEAR = Kind(
    words(
        "old new small large red blue white black brown grey yellow green heavy light long short clean dirty broken "
        "round square flat soft hard dry wet cold warm spare used plain cheap fine thick thin sharp loose tall wide "
        "narrow bright dark rough smooth strong wooden steel glass brass copper silver stone rubber plastic iron"
    ),
    words(
        "door window table chair lamp bell key lock box bag basket bottle cup plate knife spoon pot pan stove oven "
        "clock watch mirror picture flag rope chain hook hammer saw drill brush broom bucket towel blanket pillow "
        "curtain carpet coat hat glove belt scarf ring desk drawer shelf cupboard bed sofa bench ladder wheel cart "
        "engine pump pipe valve tap hose filter fan heater radio phone camera cable plug switch battery screen "
        "printer keyboard pencil ruler tray jar tin barrel crate sack tile brick board frame gate plant candle mask "
        "needle patch scale tube drum horn anchor sail net"
    ),
    words(
        "clean move check count repair replace return collect mark label pack store lock keep take bring carry lift "
        "hold wash dry cover remove weigh measure turn fold close open lend hide hang"
    ),
)
PAPERS = Kind(
    words("old new signed sealed open closed first last final missing annual weekly secret spare blank torn"),
    words(
        "letter file folder card book notebook ledger report record receipt invoice contract deed warrant bond list "
        "plan map page copy form label stamp ticket calendar"
    ),
    words("sign stamp copy file read print return send answer enter bind keep find register release pass lodge"),
)
ROOMS = words("kitchen cellar office hall store garage attic library archive workshop laundry garden yard ward lobby")
NEAR = ("in", "near", "behind", "beside", "outside", "next to")


def chore(rng: Random, prefix: str = "") -> Facts:
    """A thing and something to do with it, under names that start with `prefix`."""
    kind = rng.choice((GEAR, GEAR, PAPERS))
    bare = rng.choice(kind.things)
    facts = {"bare": bare, "thing": f"{rng.choice(kind.adjectives)} {bare}", "verb": rng.choice(kind.verbs)}
    return {prefix + key: value for key, value in facts.items()}


def inventory(rng: Random, facts: Facts) -> str:
    """What stands in a room, counted, line by line."""
    head = (
        ("Inventory of the {room}, {date}.\n", "Inventory, {company}, {room}.\n", "Counted in the {room} by {name}:\n"),
    )
    lines = [f"{count} x {chore(rng)['thing']}" for count in rng.sample(range(1, 40), rng.randint(3, 7))]
    facts = facts | {"room": rng.choice(ROOMS)}
    end = ("Checked by {my_name}.", "Seen and signed by {my_title}.", "Nothing else was found in the {room}.", "")
    return "\n".join([fill(rng, head, facts), *lines, fill(rng, (end,), facts)]).strip()


ORDERS = (
    "Please {verb} the {thing} {near} the {room}.",
    "Nobody may {verb} the {thing} without asking {my_title}.",
    "{title} will {verb} the {thing} and {other_verb} the {other_thing}.",
    "The {thing} goes to {code} {number} in {town}.",
    "We {verb} every {bare} on {weekday}.",
    "The {thing} stays {near} the {room} until {weekday}.",
    "The {thing} and the {other_thing} belong to {company}.",
    "The {brand} {bare} {near} the {room} is out of order.",
    "Ask {my_name} for the {brand} {bare}, number {number}.",
)


def notice(rng: Random, facts: Facts) -> str:
    """A few orders about things, to everybody in the house."""
    head = ("Notice to all staff, {date}.", "Notice for the {room}.", "To everybody at {company}:")
    end = ("Signed, {my_name}", "{my_name}, {town}", "")
    facts = facts | {"room": rng.choice(ROOMS), "brand": invent(rng)}
    orders = []
    for order in rng.sample(ORDERS, rng.randint(2, 5)):
        drawn = chore(rng) | chore(rng, "other_") | {"near": rng.choice(NEAR)}
        orders.append(order.format(**facts | drawn))
    return "\n".join([fill(rng, (head,), facts), " ".join(orders), fill(rng, (end,), facts)]).strip()
