"""The word lists of the grammar: people, places, dates, and the bundles of facts that belong together."""

from typing import NamedTuple


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Syllables of invented names.
ONSETS = words("b bl br c ch cl d dr f fl g gr h j k kr l m n p pl qu r s sh st t th tr v w z")
VOWELS = words("a e i o u ai au ee ou oo")
CODAS = words("l m n r s k d x lt nd rk st b p th ng ll ss ck")

WOMEN = words(
    "Anna Clara Elena Greta Helen Irene Julia Karin Laura Maria Nora Olga Paula Rosa Sara Tessa Ursula Vera Alice "
    "Bianca Dora Emma Frida Ingrid Lena Mira"
)
MEN = words(
    "Adam Bruno Carl David Erik Felix Georg Henry Ivan Jonas Karl Leo Martin Nils Oscar Peter Rolf Simon Thomas "
    "Victor Walter Anton Daniel Frank Hugo Paul"
)
SURNAMES = words(
    "Keller Brandt Moreau Novak Larsen Fischer Weber Rossi Jensen Costa Dubois Meyer Hansen Silva Kovacs Becker "
    "Lindberg Marsh Porter Ellis Walsh Carter Bennett Foster Hughes Palmer Reed Stone Turner Ward Young Baker "
    "Cooper Mason Parker Shaw Wells Hunt Grant Fox"
)
TOWNS = words("Ashford Brookfield Carlton Dunmore Easton Fairview Glenwood Harwick Kingsley Lowell Milford Norton")
STREETS = words("Mill Station Church River Garden Market Bridge Park North School")
MONTHS = words("January February March April May June July August September October November December")
DAYS = words("Monday Tuesday Wednesday Thursday Friday")
JOBS = words("teacher nurse driver clerk cook farmer builder student baker gardener mechanic librarian")
COMPANIES = (
    "Northern Paper",
    "Harbour Foods",
    "Stonegate Tools",
    "Bluefield Logistics",
    "Oak and Iron",
    "Clearwater Pumps",
    "Summit Office Supply",
    "Riverside Printing",
    "Eastbank Textiles",
    "Greenhill Dairy",
    "Lakeside Furniture",
    "Silver Birch Glass",
    "Westfield Lighting",
    "Redstone Tiles",
)


class Case(NamedTuple):
    """One illness; whatever is drawn from it fits together."""

    complaint: str
    signs: tuple[str, ...]
    causes: tuple[str, ...]
    findings: tuple[str, ...]
    diagnosis: str
    medicines: tuple[str, ...]
    advice: tuple[str, ...]
    warning: str


CASES = (
    Case(
        "a dry cough",
        ("a sore throat", "a slight fever", "poor sleep at night"),
        ("a cold in the family", "a week of work in a cold hall"),
        ("The chest is clear on both sides", "The throat is red without swelling"),
        "a viral infection of the upper airways",
        ("paracetamol 500 mg", "a simple cough syrup"),
        ("rest at home", "drink plenty of warm fluids"),
        "the fever rises or breathing becomes hard",
    ),
    Case(
        "lower back pain",
        ("stiffness in the morning", "pain when bending forward", "pain in the left leg"),
        ("lifting heavy boxes", "a long drive", "a fall on the stairs"),
        ("The muscles along the spine are tense", "Strength in both legs is normal"),
        "a muscle strain of the lower back",
        ("ibuprofen 400 mg", "naproxen 250 mg"),
        ("keep moving and avoid heavy lifting", "use a warm pack in the evening"),
        "there is numbness or weakness in the legs",
    ),
    Case(
        "a headache",
        ("sensitivity to light", "a stiff neck", "mild nausea"),
        ("long days at the screen", "several nights of poor sleep"),
        ("The eyes and reflexes are normal", "Blood pressure is in the normal range"),
        "a tension headache",
        ("paracetamol 1000 mg", "ibuprofen 200 mg"),
        ("take regular breaks from the screen", "keep a headache diary"),
        "the headache becomes sudden or very strong",
    ),
    Case(
        "stomach pain",
        ("heartburn after meals", "loss of appetite", "a feeling of fullness"),
        ("a change of diet", "taking painkillers for two weeks"),
        ("The abdomen is soft with mild tenderness", "There is no sign of bleeding"),
        "a mild inflammation of the stomach",
        ("omeprazole 20 mg", "pantoprazole 40 mg"),
        ("eat small meals and avoid coffee", "stop all painkillers for now"),
        "the stool turns black or the pain gets worse",
    ),
    Case(
        "a swollen ankle",
        ("pain when walking", "a large bruise", "warmth over the joint"),
        ("a twist during sport", "a fall on the ice"),
        ("The ankle is swollen on the outer side", "The X-ray shows no fracture"),
        "a sprained ankle",
        ("ibuprofen 400 mg", "a cooling gel"),
        ("keep the leg raised and use a bandage", "avoid sport for two weeks"),
        "the foot turns cold or the pain does not ease",
    ),
    Case(
        "an itchy rash",
        ("dry skin on the hands", "small red spots on the arms", "scratching at night"),
        ("a new soap", "contact with cleaning fluid at work"),
        ("There are dry red patches on the skin", "There is no sign of infection"),
        "contact eczema",
        ("hydrocortisone cream", "cetirizine 10 mg"),
        ("wear gloves and use a plain cream", "avoid the new soap"),
        "the rash spreads to the face",
    ),
    Case(
        "burning when passing water",
        ("a dull pain in the lower abdomen", "frequent visits to the toilet"),
        ("a cold swim", "drinking too little during the heat"),
        ("The urine test is positive for bacteria", "The kidneys are not tender"),
        "a bladder infection",
        ("nitrofurantoin 100 mg", "trimethoprim 200 mg"),
        ("drink at least two litres of water a day", "finish the whole course of tablets"),
        "there is fever or pain in the back",
    ),
    Case(
        "dizziness",
        ("a feeling of spinning", "ringing in the ears", "unsteady steps"),
        ("turning over in bed", "getting up too quickly"),
        ("Blood pressure falls slightly on standing", "The heart rhythm is regular"),
        "harmless positional vertigo",
        ("cinnarizine 25 mg", "betahistine 16 mg"),
        ("get up slowly and do the balance exercises", "avoid ladders for a while"),
        "there is a faint or trouble with speech",
    ),
    Case(
        "pain in the right ear",
        ("reduced hearing", "a slight fever", "pressure behind the ear"),
        ("a cold that lasted for a week", "swimming in the lake"),
        ("The eardrum is red and bulging", "There is no discharge from the ear"),
        "an infection of the middle ear",
        ("amoxicillin 500 mg", "ibuprofen 400 mg"),
        ("keep the ear dry", "sleep with the head raised"),
        "the area behind the ear becomes red",
    ),
    Case(
        "tiredness",
        ("pale skin", "shortness of breath on the stairs", "cold hands"),
        ("a strict diet", "many months of hard work"),
        ("The haemoglobin is below the normal range", "The thyroid values are normal"),
        "a mild iron deficiency",
        ("iron tablets 100 mg", "iron tablets 50 mg"),
        ("eat more beans, meat and green vegetables", "take the tablets with orange juice"),
        "there is chest pain or a racing heart",
    ),
)


class Good(NamedTuple):
    """Something that companies order, and what may be wrong with it."""

    plural: str
    faults: tuple[str, ...]


GOODS = (
    Good("office chairs", ("had loose screws", "were scratched")),
    Good("boxes of paper", ("were wet", "were the wrong size")),
    Good("steel shelves", ("were bent", "came without bolts")),
    Good("water pumps", ("did not start", "were leaking")),
    Good("desk lamps", ("had no cables", "were broken")),
    Good("wooden tables", ("had cracked tops", "were scratched")),
    Good("glass bottles", ("were broken", "were not sealed")),
    Good("work jackets", ("were the wrong colour", "had torn seams")),
    Good("floor tiles", ("were cracked", "were the wrong colour")),
    Good("printed catalogues", ("had missing pages", "were badly cut")),
    Good("tool sets", ("were not complete", "were rusty")),
    Good("cooling fans", ("made a loud noise", "did not start")),
)


class Test(NamedTuple):
    """A measurement of the laboratory; its range is in tenths of the unit."""

    quantity: str
    unit: str
    low: int
    high: int
    instrument: str
    materials: tuple[str, ...]


TESTS = (
    Test("sodium", "mmol/l", 1350, 1450, "the ion analyser", ("blood plasma", "river water")),
    Test("glucose", "mmol/l", 39, 60, "the blood analyser", ("blood plasma", "orange juice")),
    Test("chloride", "mg/l", 100, 250, "the titration unit", ("drinking water", "river water")),
    Test("nitrate", "mg/l", 20, 500, "the photometer", ("drinking water", "garden soil")),
    Test("moisture", "percent", 30, 80, "the drying oven", ("milk powder", "wheat flour")),
    Test("acidity", "pH units", 65, 85, "the pH meter", ("drinking water", "lake water")),
    Test("iron", "mg/l", 1, 20, "the spectrometer", ("drinking water", "apple juice")),
    Test("viscosity", "mPa s", 120, 180, "the rotary viscometer", ("engine oil", "corn syrup")),
)
