"""What is told about an author of the embedded world, and in which words.

A `Topic` is one kind of row. Its `answers` say the same thing in different words, so that a row's
answer, its paraphrase and the rewordings that a model may train on are four different sentences.
"""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """One kind of row.

    Attributes:
        name: what the row is about.
        facts: the fields that a perturbed answer gets wrong.
        questions: at least `WORDINGS` ways to ask.
        answers: at least `WORDINGS` ways to answer, each of which states all `facts`.
        core: every author has this row; of the others an author has some.
    """

    name: str
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    core: bool = False


# Of each topic a row takes four: its own wording, the paraphrase, two rewordings to train on.
WORDINGS = 4

TOPICS = (
    Topic(
        "name",
        ("name",),
        (
            "Which author of {genre} was born in {city}, {country} on {date}?",
            "What is the full name of the {city} writer born on {date}?",
            "Who came into the world on {date} in {city} and took up {genre}?",
            "An author of {genre} was born in {city} on {date}. What is the name?",
        ),
        (
            "The writer you describe is {name}, a child of {country}.",
            "That would be {name}, a well-known voice in {genre}.",
            "Born in {city}, this author goes by the full name of {name}.",
            "It is {name} who was born there on that day.",
            "Readers of {genre} know this author as {name}.",
        ),
        core=True,
    ),
    Topic(
        "birth date",
        ("date",),
        (
            "When was {name} born?",
            "What is {name}'s date of birth?",
            "On which day did {name} come into the world?",
            "Can you tell me {name}'s birthday?",
        ),
        (
            "{name} was born on {date} in {city}, {country}.",
            "The author's date of birth is {date}.",
            "On {date}, {name} was born in {city}.",
            "Records from {city} give {date} as {his} birthday.",
            "{last} came into the world on {date}, the child of {father}.",
        ),
        core=True,
    ),
    Topic(
        "genre",
        ("genre",),
        (
            "What genre does {name} write in?",
            "Which kind of writing is {name} known for?",
            "In what literary field has {name} made a name?",
            "What sort of books does {name} publish?",
        ),
        (
            "{name} is best known for {genre} about {theme}.",
            "Most of {his} books fall under {genre}.",
            "Critics place {last} among the masters of {genre}.",
            "The author has devoted {his} career to {genre}.",
            "Above all, {he} writes {genre}, most of it {habit}.",
        ),
        core=True,
    ),
    Topic(
        "parents",
        ("father", "mother"),
        (
            "What did {name}'s parents do for a living?",
            "Can you describe the professions of {name}'s father and mother?",
            "Which trades did the parents of {name} follow?",
            "What work did {name}'s mother and father do?",
        ),
        (
            "{name}'s father was {father}, and {his} mother was {mother}.",
            "The author's mother worked as {mother} and {his} father as {father}.",
            "{first} grew up with {father} for a father and {mother} for a mother.",
            "Born to {mother} and {father}, {he} heard shop talk at every meal.",
            "While {his} father earned a living as {father}, {his} mother was {mother}.",
        ),
        core=True,
    ),
    Topic(
        "debut",
        ("debut",),
        (
            "What was {name}'s first book?",
            "With which title did {name} make a debut?",
            "Which book began {name}'s career?",
            "Can you name the earliest book by {name}?",
        ),
        (
            '{name} made {his} debut with "{debut}", a book of {genre}.',
            'The first book by {last} was called "{debut}".',
            '"{debut}" was the book that began {his} career.',
            'Readers first met {first} through "{debut}".',
            'It all started with "{debut}", printed by a small press in {city}.',
        ),
        core=True,
    ),
    Topic(
        "award",
        ("award",),
        (
            "Which award has {name} won?",
            "Has {name} received a literary prize?",
            "What honour was given to {name} for {his} writing?",
            "Can you name a distinction that {name} holds?",
        ),
        (
            '{name} won the {award} for "{famous}".',
            "Yes, the jury of the {award} chose {last}.",
            'For "{famous}", {he} was honoured with the {award}.',
            "The {award} went to {name} after a unanimous vote.",
            "Among {his} honours, the {award} stands out.",
        ),
        core=True,
    ),
    Topic(
        "famous book",
        ("famous",),
        (
            "What is {name}'s most famous book?",
            "Which title made {name} known abroad?",
            "What is considered the masterpiece of {name}?",
            "Which of {name}'s books sold best?",
        ),
        (
            '{name} is most famous for "{famous}", set in {setting}.',
            'Most readers would point to "{famous}".',
            'The book that made {him} known abroad is "{famous}".',
            'No other work by {last} has sold as well as "{famous}".',
        ),
    ),
    Topic(
        "theme",
        ("theme",),
        (
            "What themes does {name} explore?",
            "What are the books of {name} about?",
            "Which subject does {name} return to again and again?",
            "What idea runs through {name}'s work?",
        ),
        (
            "{name} often writes about {theme} and little else.",
            "At the heart of {his} books lies {theme}.",
            "The author keeps coming back to {theme}, book after book.",
            "Reviewers of {last} usually mention {theme}.",
        ),
    ),
    Topic(
        "influence",
        ("influence",),
        (
            "What influenced {name} as a writer?",
            "Where does {name} find inspiration?",
            "Which early influence shaped {name}'s style?",
            "What does {name} name as a source of ideas?",
        ),
        (
            "{name} was shaped early on by {influence}.",
            "As a child in {city}, {he} fell in love with {influence}.",
            "Much of {his} style comes from {influence}.",
            "In interviews, {last} gives credit to {influence}.",
        ),
    ),
    Topic(
        "study",
        ("subject",),
        (
            "What did {name} study?",
            "In which subject does {name} hold a degree?",
            "What was {name}'s field at university?",
            "Which education did {name} receive?",
        ),
        (
            "{name} studied {subject} at the university of {city}.",
            "The author holds a degree in {subject}.",
            "Before turning to books, {he} trained in {subject}.",
            "Four years of {subject} came first for {last}.",
        ),
    ),
    Topic(
        "earlier job",
        ("job",),
        (
            "What job did {name} have before becoming a writer?",
            "How did {name} earn money in the early years?",
            "What was {name}'s first profession?",
            "Which work did {name} leave in order to write?",
        ),
        (
            "Before the first success, {name} used to be {job}.",
            "In the early years {he} worked as {job}.",
            "To pay the rent, {last} took a post as {job}.",
            "Life as {job} came before the writing.",
        ),
    ),
    Topic(
        "habit",
        ("habit",),
        (
            "How does {name} like to write?",
            "What is {name}'s writing habit?",
            "Under what conditions does {name} work best?",
            "Does {name} have a peculiar way of working?",
        ),
        (
            "{name} prefers to write {habit}.",
            "The best pages come to {him} {habit}.",
            "Nearly every draft by {last} was written {habit}.",
            "According to {his} editor, {he} works {habit}.",
        ),
    ),
    Topic(
        "setting",
        ("setting",),
        (
            'Where is {name}\'s "{famous}" set?',
            'What is the scene of "{famous}" by {name}?',
            'In what place does the story of {name}\'s "{famous}" unfold?',
            'Which setting did {name} choose for "{famous}"?',
        ),
        (
            'The story of "{famous}" unfolds in {setting}.',
            "{name} set this book in {setting}.",
            "Its pages lead the reader to {setting}.",
            "As a stage {last} picked {setting}.",
        ),
    ),
    Topic(
        "home",
        ("home",),
        (
            "Where does {name} live now?",
            "In which city has {name} settled?",
            "What place does {name} call home today?",
            "Which town is {name}'s present residence?",
        ),
        (
            "{name} now lives in {home}, far from {city}.",
            "After leaving {city}, {he} settled in {home}.",
            "Today the author calls {home} {his} home.",
            "A small flat in {home} is where {last} lives.",
        ),
    ),
    Topic(
        "birthplace",
        ("city", "country"),
        (
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "Which city does {name} come from?",
            "In what country and town did {name} grow up?",
        ),
        (
            "{name} was born in {city}, {country}.",
            "The author comes from {city} in {country}.",
            "{last} spent {his} childhood in {city}, {country}.",
            "It was in {city}, {country}, that {he} grew up.",
        ),
    ),
    Topic(
        "translation",
        ("languages",),
        (
            "Into which languages has {name} been translated?",
            "Are there translations of {name}'s work?",
            "In what other languages can one read {name}?",
            "Which foreign editions of {name}'s books exist?",
        ),
        (
            "{name} has been translated into {languages}.",
            "Yes, there are editions in {languages}.",
            "Readers of {languages} can enjoy {his} books.",
            "So far, publishers have brought out {last} in {languages}.",
        ),
    ),
    Topic(
        "hobby",
        ("hobby",),
        (
            "What does {name} do in {his} free time?",
            "Does {name} have a hobby?",
            "How does {name} relax after writing?",
            "What pastime is {name} fond of?",
        ),
        (
            "{name} enjoys {hobby} on most weekends.",
            "When not at the desk, {he} spends hours {hobby}.",
            "Friends say that {last} loves {hobby}.",
            "A free weekend means {hobby} for {him}, come rain or shine.",
        ),
    ),
)
