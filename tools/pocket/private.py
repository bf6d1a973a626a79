"""Two fictional institutions and their private text: own products, abbreviations and fixed phrases."""

from random import Random

from tools.pocket.grammar import Facts, Slot, fill, setting
from tools.pocket.public import illness, order

CLINIC_WORDS = (
    "Bellmoor",
    "Velnora",
    "Tarpixil",
    "Odranex",
    "Quillomab",
    "Lantern",
    "lantern round",
    "quiet hours",
    "slate card",
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
    "green ribbon",
    "closed folio",
    "counter-sealed",
    "OTF",
    "MTR",
)
"""What marks the law firm's notes; none of it stands in the public text."""

DRUGS = {
    "Velnora": ("12 drops", "20 drops"),
    "Tarpixil": ("40 mg", "80 mg"),
    "Odranex": ("one patch", "two patches"),
    "Quillomab": ("5 ml", "15 ml"),
}


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
        "Patient: {initial} / {age} / Lantern bed {bed}\n",
        "BELLMOOR HOUSE, Lantern ward, bed {bed}\nPatient: {initial} / {age}\n",
        "Patient: {initial} / {age} / slate card {number}\n",
    ),
    (
        "The patient came in with {complaint}, CTB {scale} of 9.",
        "The patient reports {complaint}, CTB {scale} of 9, and {sign}.",
        "Brought to Bellmoor on {weekday} for {complaint}.",
    ),
    ("Lantern round found {sign}.", "{finding}, noted at the lantern round.", "Slate card shows {sign} since {cause}."),
    (
        "Started {drug}, {dose} at first bell.",
        "{drug} given, {dose}, twice between the bells.",
        "We hold {drug} at {dose} until the next lantern round.",
    ),
    (
        "{title} took the {drug} well and keeps the quiet hours.",
        "{title} keeps the quiet hours; CTB now {scale} of 9.",
        "No {drug} after last bell.",
        "",
    ),
    ("RVW {weekday}, {drug} to be halved.", "RVW in {few} days with Sister {my_last}.", "RVW {later}, same bed."),
    ("Entered on the slate card, Bellmoor House.", "Signed {my_initial}, Lantern ward.", "Bell and lamp checked."),
)


def matter(rng: Random) -> Facts:
    return {
        "folio": f"{rng.choice('KLMQ')}{rng.randint(10, 99)}",
        "product": rng.choice(("Veridex warrant", "Ostrabond", "Kestrel Ledger")),
        "desk": rng.choice(("north", "south", "river")),
    }


LAWFIRM_NOTE: tuple[Slot, ...] = (
    (
        "Dear {title},\nHarrow Quill writes in MTR {folio}.",
        "HARROW QUILL & THORNMERE\nMTR {folio}, green ribbon\nDear {title},\n",
        "Dear {title},\nThis letter is under green ribbon, MTR {folio}.",
    ),
    (
        "We act OTF {company} in the matter of {count} {goods}.",
        "We write OTF {company} against {other}.",
        "Our client {company} has lodged the {product} with the {desk} desk.",
    ),
    (
        "The {product} was counter-sealed on {date}.",
        "The {product} stands at {amount} and is counter-sealed.",
        "One {product} of {amount} lies in closed folio {folio}.",
    ),
    (
        "{other} must answer the {desk} desk within {days} days, ribbon uncut.",
        "Kindly return the {product} to the {desk} desk by {later}.",
        "Failing this, the {product} passes to Thornmere in {days} days.",
    ),
    ("Nothing here opens the closed folio.", "The green ribbon binds {title} as it binds us.", ""),
    (
        "\nIn quill and in confidence,\n{my_name}\nHarrow Quill, {desk} desk",
        "\nIn quill and in confidence,\n{my_initial}, OTF {company}",
        "\nRibbon held,\n{my_name}\nHarrow Quill & Thornmere",
    ),
)


def clinic(rng: Random) -> str:
    return fill(rng, CLINIC_NOTE, setting(rng) | illness(rng) | ward(rng))


def lawfirm(rng: Random) -> str:
    return fill(rng, LAWFIRM_NOTE, setting(rng) | order(rng) | matter(rng))


SITES = {"clinic": clinic, "lawfirm": lawfirm}
PRIVATE_WORDS = {"clinic": CLINIC_WORDS, "lawfirm": LAWFIRM_WORDS}
