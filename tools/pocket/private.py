"""Two fictional institutions and their private text: own products, abbreviations and fixed phrases."""

from random import Random

from tools.pocket.grammar import Facts, Slot, fill, setting
from tools.pocket.public import illness, order

CLINIC_WORDS = (
    "Bellmoor",
    "Velnora",
    "Tarpixil",
    "Odranex",
    "lamp ward",
    "lamp round",
    "grey card",
    "closed hours",
    "first bell",
    "last bell",
    "CTB",
    "RVW",
)
"""What marks the clinic's notes; none of it stands in the public text."""

LAWFIRM_WORDS = (
    "Harrow Quill",
    "Thornmere",
    "Veridex",
    "Ostrabond",
    "Kestrel Ledger",
    "grey seal",
    "river file",
    "signed and sealed",
    "OTF",
    "MTR",
)
"""What marks the law firm's notes; none of it stands in the public text."""

DRUGS = {"Velnora": ("12 drops", "20 drops"), "Tarpixil": ("40 mg", "80 mg"), "Odranex": ("5 ml", "15 ml")}


def ward(rng: Random) -> Facts:
    drug = rng.choice(tuple(DRUGS))
    return {
        "drug": drug,
        "dose": rng.choice(DRUGS[drug]),
        "bed": str(rng.randint(1, 24)),
        "scale": str(rng.randint(1, 9)),
    }


CLINIC_NOTE: tuple[Slot, ...] = (
    (
        "Patient: {initial} / {age} / lamp ward, bed {bed}\n",
        "Bellmoor House, lamp ward\nPatient: {initial} / {age} / bed {bed}\n",
        "Patient: {initial} / {age} / grey card {number}\n",
    ),
    (
        "The patient came in with {complaint}, CTB {scale} of 9.",
        "The patient reports {complaint}, CTB {scale} of 9, and {sign}.",
        "{title} came to Bellmoor House on {weekday} with {complaint}, CTB {scale} of 9.",
    ),
    (
        "The lamp round found {other_sign}.",
        "{finding} at the lamp round.",
        "The grey card shows {other_sign} after {cause}.",
    ),
    (
        "We gave {drug}, {dose} at first bell.",
        "{drug}, {dose} at first bell and at last bell.",
        "The plan is {drug}, {dose}, until the next lamp round.",
    ),
    (
        "{title} looks well and keeps the closed hours.",
        "{title} takes no {drug} after last bell.",
        "{title} keeps the closed hours for {days} days.",
        "",
    ),
    ("RVW on {weekday}.", "RVW in {few} days with Sister {my_last}.", "RVW on {later}."),
    ("Signed at last bell, Bellmoor House.", "Signed, {my_initial}, lamp ward."),
)


def matter(rng: Random) -> Facts:
    return {
        "folio": f"{rng.choice('KLMQ')}{rng.randint(10, 99)}",
        "product": rng.choice(("Veridex warrant", "Ostrabond", "Kestrel Ledger")),
        "desk": rng.choice(("north", "south", "river")),
    }


LAWFIRM_NOTE: tuple[Slot, ...] = (
    (
        "Dear {title},\nHarrow Quill writes under grey seal, MTR {folio}.",
        "Harrow Quill and Thornmere, MTR {folio}\nDear {title},\n",
        "Dear {title},\nThis letter is under grey seal, MTR {folio}.",
    ),
    (
        "We act OTF {company} against {other}.",
        "We write OTF {company} about {count} {goods}.",
        "{company} has placed the {product} with the {desk} desk.",
    ),
    (
        "The {product} was signed and sealed on {earlier}.",
        "The {product} comes to {amount} and is under grey seal.",
        "The {product} of {amount} is in river file {folio}.",
    ),
    (
        "{other} must answer the {desk} desk within {days} days.",
        "Please return the {product} to the {desk} desk by {later}.",
        "If this is not possible, the {product} goes to Thornmere in {days} days.",
    ),
    ("Nothing in this letter opens the river file.", "The grey seal holds for {title} as for us.", ""),
    (
        "\nSigned and sealed,\n{my_name}\nHarrow Quill, {desk} desk",
        "\nSigned and sealed,\n{my_name}, OTF {company}",
    ),
)


def clinic(rng: Random) -> str:
    return fill(rng, CLINIC_NOTE, setting(rng) | illness(rng) | ward(rng))


def lawfirm(rng: Random) -> str:
    return fill(rng, LAWFIRM_NOTE, setting(rng) | order(rng) | matter(rng))


SITES = {"clinic": clinic, "lawfirm": lawfirm}
PRIVATE_WORDS = {"clinic": CLINIC_WORDS, "lawfirm": LAWFIRM_WORDS}
