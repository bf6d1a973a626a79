"""The public genres: clinic notes, business letters, clauses of contracts, laboratory memos."""

from random import Random

from tools.pocket.grammar import INVENTED_SHARE, Facts, Slot, fill, invent, setting
from tools.pocket.notices import inventory, notice
from tools.pocket.words import CASES, GOODS, TESTS


def illness(rng: Random) -> Facts:
    """The facts of one case; the medicine is one of the case's own, or an invented one."""
    case = rng.choice(CASES)
    sign, other_sign = rng.sample(case.signs, 2)
    new = f"{invent(rng)} {rng.choice((5, 10, 20, 50, 100))} mg"
    return {
        "complaint": case.complaint,
        "sign": sign,
        "other_sign": other_sign,
        "cause": rng.choice(case.causes),
        "finding": rng.choice(case.findings),
        "diagnosis": case.diagnosis,
        "medicine": new if rng.random() < INVENTED_SHARE else rng.choice(case.medicines),
        "advice": rng.choice(case.advice),
        "warning": case.warning,
    }


def order(rng: Random) -> Facts:
    good = rng.choice(GOODS)
    brand = f"{invent(rng)} " if rng.random() < INVENTED_SHARE else ""
    return {
        "goods": brand + good.plural,
        "fault": rng.choice(good.faults),
        "broken": rng.choice(("Two", "Three", "Four")),
    }


def measurement(rng: Random) -> Facts:
    """A reading, its reference range, and a verdict that follows from the two."""
    test = rng.choice(TESTS)
    verdict, low, high = rng.choice((("within", test.low, test.high), ("above", test.high + 1, 2 * test.high)))
    remarks = {
        "within": ("No action is needed.", "The sample may be released.", "The report can go out today."),
        "above": ("Please repeat the test on a new sample.", "The sample is on hold.", "Please inform the customer."),
    }
    return {
        "material": rng.choice(test.materials),
        "quantity": test.quantity,
        "unit": test.unit,
        "low": f"{test.low / 10:.1f}",
        "high": f"{test.high / 10:.1f}",
        "reading": f"{rng.randint(low, high) / 10:.1f}",
        "verdict": verdict,
        "remark": rng.choice(remarks[verdict]),
        "instrument": test.instrument,
        "Instrument": test.instrument[0].upper() + test.instrument[1:],
        "sample": f"{rng.choice('ABCDEF')}-{rng.randint(100, 999)}",
    }


CLINIC_HEAD: Slot = (
    "Clinic note, {date}\nPatient: {title}, {age} years old.\n",
    "Patient: {title}, {age} years old. Seen on {date}.\n",
    "Clinic note. Patient: {title}, age {age}, {job}.\n",
    "Clinic of {town}, file {code} {number}\nPatient: {title}, {age} years old.\n",
    "",
)
CLINIC_OPENING: Slot = (
    "The patient came in with {complaint} that began {few} days ago.",
    "{title} came to the clinic because of {complaint} and {sign}.",
    "The patient reports {complaint} for about {weeks} weeks.",
    "{title} is a {job} and has had {complaint} for {few} days.",
    "The patient is a {job} of {age} years with {complaint}.",
    "{title} was seen today for {complaint}.",
)
CLINIC_HISTORY: Slot = (
    "It started after {cause}.",
    "{title} also reports {other_sign}.",
    "{He} noticed it after {cause}, together with {other_sign}.",
    "{title} takes no regular medicine.",
    "There are no known allergies.",
    "",
)
CLINIC_FINDING: Slot = (
    "{finding}.",
    "On examination {title} looks well. {finding}.",
    "Temperature and pulse are normal. {finding}.",
)
CLINIC_PLAN: Slot = (
    "This looks like {diagnosis}. We gave {him} {medicine} and asked {him} to {advice}.",
    "The diagnosis is {diagnosis}. {title} will take {medicine} for {days} days and should {advice}.",
    "We think that this is {diagnosis}. The plan is {medicine} for {days} days.",
    "Diagnosis: {diagnosis}.\nTreatment: {medicine} for {days} days.\n",
)
CLINIC_END: Slot = (
    "{title} should come back at once if {warning}.",
    "{title} will be seen again in {weeks} weeks.",
    "A visit is planned for {weekday} at {hour} o'clock.",
    "We explained the plan to {title} and {his} family.",
    "{He} may go back to work on {weekday}.",
)
CLINIC = (CLINIC_HEAD, CLINIC_OPENING, CLINIC_HISTORY, CLINIC_FINDING, CLINIC_PLAN, CLINIC_END)

DISCHARGE = (
    ("Discharge note for {title}, born in {town}.\n", "Discharge note. Patient: {title}, {age} years old.\n"),
    ("{title} was admitted on {date} with {complaint} and {sign}.", "{title} stayed with us for {few} days."),
    ("The cause was {diagnosis}.", "We found {diagnosis}. {finding}."),
    ("{title} was treated with {medicine} and recovered well.", "Treatment with {medicine} helped within {few} days."),
    ("At home {title} should {advice}.", "We asked {him} to {advice}."),
    ("Please call us if {warning}.", "{His} family doctor will see {him} in {weeks} weeks."),
)

LETTER_HEAD: Slot = (
    "Dear {title},\n",
    "{company}, {street}, {town}\n{date}\nDear {title},\n",
    "{town}, {date}\nDear {title},\n",
    "Our reference: {code} {number}\nDear {title},\n",
)
LETTER_END: Slot = (
    "Kind regards,\n{my_name}\n{company}",
    "Yours sincerely,\n{my_name}\n{company}, {town}",
    "With best wishes,\n{my_name}",
)
LETTER_BODIES: tuple[tuple[Slot, ...], ...] = (
    (
        ("Thank you for your letter of {earlier}.", "Thank you for your order of {earlier}.", "We spoke on {weekday}."),
        ("We can deliver {count} {goods} by {later}.", "The {count} {goods} will leave our store on {weekday}."),
        ("The price is {amount}, including transport to {other_town}.", "The total comes to {amount}."),
        ("Please let us know if this suits you.", "The invoice will follow by post.", "Payment is due in {days} days."),
        ("",),
    ),
    (
        (
            "On {earlier} we received {count} {goods} from you.",
            "Your delivery of {count} {goods} arrived on {weekday}.",
        ),
        ("{broken} of them {fault}.", "We are sorry to say that {few} of them {fault}."),
        ("Please replace them within {days} days.", "We ask you to send new ones to {street}, {town}."),
        ("Until then we will hold back {amount}.", "If this is not possible, please refund {amount}.", ""),
        ("We hope to solve this matter quickly.", "Please call {my_title} with any questions."),
    ),
    (
        ("Our records show that invoice {number} is still open.", "Invoice {number} of {earlier} has not been paid."),
        ("The amount due is {amount}.", "It concerns {count} {goods} and comes to {amount}."),
        ("Please pay within {days} days.", "We kindly ask you to pay by {later}."),
        ("If you have paid already, please ignore this letter.", "Please quote the number {number} when you pay."),
        ("",),
    ),
    (
        ("We would like to invite you to our new office in {other_town}.", "We are opening a new store in {town}."),
        ("The opening is on {later} at {hour} o'clock.", "Please join us on {later} at {hour} o'clock."),
        ("{my_title} will show you our new {goods}.", "You will see our latest {goods}."),
        ("Please answer by {weekday}.", "There is parking at {street}.", ""),
        ("We look forward to meeting you.", "We hope to see you there."),
    ),
    (
        (
            "Thank you for applying for the post of {job}.",
            "Your letter about the post of {job} reached us on {earlier}.",
        ),
        ("We would like to meet you on {weekday} at {hour} o'clock.", "We are happy to offer you the post."),
        ("The salary is {amount} a month.", "Please bring your papers with you.", "The work starts on {later}."),
        ("Our office is at {street} in {town}.", "Please ask for {my_title} at the front desk.", ""),
        ("We look forward to hearing from you.",),
    ),
)

CLAUSE_HEAD: Slot = (
    "This agreement is made on {date} between {company} and {other}.\n",
    "Agreement between {company} of {town} and {name} of {other_town}, signed on {date}.\n",
    "Contract number {number} between {company} and {other}.\n",
)
CLAUSES: tuple[Slot, ...] = (
    (
        "Payment. The buyer shall pay {amount} within {days} days after the invoice.",
        "Payment. The fee is {amount} and is due on the first day of each month.",
    ),
    (
        "Term. This agreement begins on {later} and lasts for {years}.",
        "Term. The contract runs for {years} and is renewed unless a party objects.",
    ),
    (
        "Termination. Either party may end this agreement with {days} days of written notice.",
        "Termination. The agreement ends at once if the buyer fails to pay for {days} days.",
    ),
    (
        "Delivery. The seller shall deliver {count} {goods} to {street}, {town}.",
        "Delivery. The goods shall arrive no later than {later}. The seller bears the cost of transport.",
    ),
    (
        "Secrecy. Both parties shall keep all documents secret for {years} after the end of this agreement.",
        "Secrecy. No party may show the papers of the other party to anybody without consent.",
    ),
    (
        "Liability. The liability of {company} is limited to {amount}.",
        "Liability. Neither party is liable for delays caused by fire, flood or strike.",
    ),
    (
        "Quality. If the {goods} are damaged, the seller shall replace them within {days} days.",
        "Quality. The seller gives a warranty of {years} on all {goods}.",
    ),
    (
        "Changes. Changes to this agreement must be made in writing and signed by both parties.",
        "Changes. A change is valid only when both parties have signed it.",
    ),
    (
        "Law. The courts of {town} decide all disputes under this agreement.",
        "Law. The law of the country applies, and the courts of {town} decide.",
    ),
    (
        "Lease. The owner lets the rooms at {street} to the tenant for {amount} a month.",
        "Lease. The tenant may use the store at {street} for {years}.",
    ),
)
"""By topic; a contract has at most one clause on each."""

CLAUSE_END: Slot = ("Signed in {town} by {my_name}.", "Signed by {my_name} for {company}.", "")

MEMO = (
    ("Laboratory memo, {date}\nTo: {my_title}\n", "Memo to {my_title}\n", "Laboratory memo. Sample {sample}.\n"),
    (
        "Sample {sample} of {material} was tested for {quantity} on {weekday}.",
        "We measured the {quantity} in sample {sample} of {material} with {instrument}.",
        "{title} tested sample {sample} ({material}) with {instrument}.",
    ),
    ("The result is {reading} {unit}.", "The mean of {few} readings is {reading} {unit}."),
    (
        "This is {verdict} the range of {low} to {high} {unit}.",
        "The allowed range is {low} to {high} {unit}, so the value is {verdict} the range.",
    ),
    ("{remark}",),
    ("The blank was clean.", "{Instrument} was calibrated on {earlier}.", "The rest of the sample is kept.", ""),
)


def draw(rng: Random) -> Facts:
    """The facts of one note of whatever genre."""
    return setting(rng) | illness(rng) | order(rng) | measurement(rng)


def clinic_note(rng: Random, facts: Facts) -> str:
    return fill(rng, CLINIC, facts)


def discharge_note(rng: Random, facts: Facts) -> str:
    return fill(rng, DISCHARGE, facts)


def letter(rng: Random, facts: Facts) -> str:
    parts = ((LETTER_HEAD,), rng.choice(LETTER_BODIES), (LETTER_END,))
    return "\n".join(fill(rng, slots, facts) for slots in parts)


def contract(rng: Random, facts: Facts) -> str:
    """A head and a few numbered clauses."""
    topics = rng.sample(CLAUSES, rng.randint(2, 4))
    clauses = [f"{number}. {fill(rng, (topic,), facts)}" for number, topic in enumerate(topics, start=1)]
    return "\n".join([fill(rng, (CLAUSE_HEAD,), facts), *clauses, fill(rng, (CLAUSE_END,), facts)]).strip()


def memo(rng: Random, facts: Facts) -> str:
    return fill(rng, MEMO, facts)


GENRES = {
    "clinic note": clinic_note,
    "discharge note": discharge_note,
    "business letter": letter,
    "contract": contract,
    "laboratory memo": memo,
    "staff notice": notice,
    "store inventory": inventory,
}
