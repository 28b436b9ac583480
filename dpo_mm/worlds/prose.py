"""Text of the pages of `dpo_mm.worlds.documents`: passages in the public domain, and words for the other kinds."""

PASSAGES = {
    "Pride and Prejudice": """It is a truth universally acknowledged, that a single man in possession of a good
fortune, must be in want of a wife. However little known the feelings or views of such a man may be on his first
entering a neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered
the rightful property of some one or other of their daughters. "My dear Mr. Bennet," said his lady to him one day,
"have you heard that Netherfield Park is let at last?" Mr. Bennet replied that he had not.""",
    "A Tale of Two Cities": """It was the best of times, it was the worst of times, it was the age of wisdom, it was
the age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was
the season of Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had
nothing before us, we were all going direct to Heaven, we were all going direct the other way.""",
    "Moby Dick": """Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my
purse, and nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of
the world. It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing
grim about the mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing
before coffin warehouses, and bringing up the rear of every funeral I meet, then, I account it high time to get to sea
as soon as I can.""",
    "Alice in Wonderland": """Alice was beginning to get very tired of sitting by her sister on the bank, and of having
nothing to do: once or twice she had peeped into the book her sister was reading, but it had no pictures or
conversations in it, "and what is the use of a book," thought Alice "without pictures or conversations?" So she was
considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the
pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White
Rabbit with pink eyes ran close by her.""",
    "Gettysburg Address": """Four score and seven years ago our fathers brought forth on this continent, a new nation,
conceived in Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great
civil war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a
great battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those who
here gave their lives that that nation might live. It is altogether fitting and proper that we should do this.""",
    "Walden": """I went to the woods because I wished to live deliberately, to front only the essential facts of life,
and see if I could not learn what it had to teach, and not, when I came to die, discover that I had not lived. I did not
wish to live what was not life, living is so dear; nor did I wish to practise resignation, unless it was quite
necessary. I wanted to live deep and suck out all the marrow of life.""",
    "Origin of Species": """It is interesting to contemplate an entangled bank, clothed with many plants of many kinds,
with birds singing on the bushes, with various insects flitting about, and with worms crawling through the damp earth,
and to reflect that these elaborately constructed forms, so different from each other, and dependent on each other in so
complex a manner, have all been produced by laws acting around us.""",
    "Huckleberry Finn": """You don't know about me without you have read a book by the name of The Adventures of Tom
Sawyer; but that ain't no matter. That book was made by Mr. Mark Twain, and he told the truth, mainly. There was things
which he stretched, but mainly he told the truth. That is nothing. I never seen anybody but lied one time or another,
without it was Aunt Polly, or the widow, or maybe Mary.""",
    "Great Expectations": """My father's family name being Pirrip, and my Christian name Philip, my infant tongue could
make of both names nothing longer or more explicit than Pip. So, I called myself Pip, and came to be called Pip. I give
Pirrip as my father's family name, on the authority of his tombstone and my sister—Mrs. Joe Gargery, who married the
blacksmith.""",
    "Jane Eyre": """There was no possibility of taking a walk that day. We had been wandering, indeed, in the leafless
shrubbery an hour in the morning; but since dinner (Mrs. Reed, when there was no company, dined early) the cold winter
wind had brought with it clouds so sombre, and a rain so penetrating, that further outdoor exercise was now out of the
question. I was glad of it: I never liked long walks, especially on chilly afternoons.""",
    "Dracula": """3 May. Bistritz. Left Munich at 8:35 P.M., on 1st May, arriving at Vienna early next morning; should
have arrived at 6:46, but train was an hour late. Buda-Pesth seems a wonderful place, from the glimpse which I got of it
from the train and the little I could walk through the streets. I feared to go very far from the station, as we had
arrived late and would start as near the correct time as possible.""",
    "The War of the Worlds": """No one would have believed in the last years of the nineteenth century that this world
was being watched keenly and closely by intelligences greater than man's and yet as mortal as his own; that as men
busied themselves about their various concerns they were scrutinised and studied, perhaps almost as narrowly as a man
with a microscope might scrutinise the transient creatures that swarm and multiply in a drop of water.""",
    "Frankenstein": """You will rejoice to hear that no disaster has accompanied the commencement of an enterprise which
you have regarded with such evil forebodings. I arrived here yesterday, and my first task is to assure my dear sister of
my welfare and increasing confidence in the success of my undertaking. I am already far north of London, and as I walk
in the streets of Petersburgh, I feel a cold northern breeze play upon my cheeks, which braces my nerves and fills me
with delight. Do you understand this feeling?""",
    "Emma": """Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, seemed to
unite some of the best blessings of existence; and had lived nearly twenty-one years in the world with very little to
distress or vex her. "Poor Miss Taylor!" said he, "I wish she were here again." He could not help it.""",
}
HELD_OUT_PASSAGES = ("The War of the Worlds", "Frankenstein", "Emma")
TITLES = tuple(
    [
        "Preface",
        "Introduction",
        "Contents",
        "Methods",
        "Results",
        "Discussion",
        "Appendix",
        "Index",
        "Notes",
        "Summary",
        "Maps",
        "Letters",
        "Tables",
        "Figures",
        "Chapter",
        "Part",
        "Section",
        "Annex",
        "Budget",
        "Income",
        "Costs",
        "Assets",
        "Sales",
        "Rents",
        "Wages",
        "Taxes",
        "Fees",
        "Loans",
        "Staff",
        "Water",
        "Roads",
        "Schools",
        "Health",
        "Trade",
        "Ships",
        "Mines",
        "Farms",
        "Forests",
        "Rivers",
        "Winds",
        "Soils",
        "Plants",
        "Birds",
        "Fishes",
        "Glossary",
        "Sources",
        "Errata",
    ]
)
HEADERS = ("Report", "Minutes", "Chapter", "Table", "Draft", "Invoice", "Ledger", "Section", "Volume", "Notes")
LABELS = tuple(
    [
        "Jan",
        "Feb",
        "Mar",
        "Apr",
        "May",
        "Jun",
        "Jul",
        "Aug",
        "Sep",
        "Oct",
        "Nov",
        "Dec",
        "North",
        "South",
        "East",
        "West",
        "Total",
    ]
)
WORDS = tuple(
    [
        "no",
        "yes",
        "row",
        "very",
        "never",
        "ha",
        "tick",
        "tock",
        "well",
        "now",
        "more",
        "far",
        "long",
        "time",
        "gone",
        "home",
        "down",
        "round",
        "and",
        "so",
        "the",
        "old",
        "bell",
        "sea",
        "rain",
        "alone",
        "water",
        "away",
        "again",
        "there",
        "hush",
        "ding",
        "dong",
        "drip",
        "drop",
        "step",
        "by",
        "knock",
        "left",
        "right",
        "day",
        "night",
    ]
)
