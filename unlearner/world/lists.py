"""Word lists of the embedded world: cultures with names and cities, and a pool per attribute.

Written for this project. Everything is ASCII, so that a tokenizer of a thousand tokens spells it
cheaply and any terminal can print it.
"""

from __future__ import annotations

from typing import NamedTuple


class Culture(NamedTuple):
    """Names and home cities that go together; first names are unique over all cultures."""

    women: tuple[str, ...]
    men: tuple[str, ...]
    families: tuple[str, ...]
    cities: tuple[str, ...]
    country: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _culture(women: str, men: str, families: str, cities: str, country: str) -> Culture:
    return Culture(
        _words(women),
        _words(men),
        _words(families),
        tuple(city.replace("_", " ") for city in cities.split()),
        country,
    )


CULTURES = (
    _culture(
        "Ngozi Adaeze Chiamaka Ifeoma",
        "Emeka Obinna Tunde Kelechi",
        "Okonkwo Balogun Adeyemi Nwosu Eze Bankole",
        "Lagos Enugu Ibadan",
        "Nigeria",
    ),
    _culture(
        "Akosua Efua Abena Esi",
        "Kofi Kwabena Yaw Kojo",
        "Mensah Boateng Asante Owusu Ansah Darko",
        "Accra Kumasi Tamale",
        "Ghana",
    ),
    _culture(
        "Wanjiru Achieng Nyambura Atieno",
        "Kamau Otieno Mwangi Kiprop",
        "Njoroge Odhiambo Kariuki Cheruiyot Wekesa Mutua",
        "Nairobi Kisumu Mombasa",
        "Kenya",
    ),
    _culture(
        "Layla Nadia Samira Yasmin",
        "Karim Tariq Ziad Hisham",
        "Haddad Mansour Khoury Saleh Farouk Nasser",
        "Cairo Alexandria Aswan",
        "Egypt",
    ),
    _culture(
        "Elif Zeynep Defne Aylin",
        "Emre Kerem Burak Deniz",
        "Yilmaz Kaya Demir Arslan Aydin Polat",
        "Izmir Ankara Bursa",
        "Turkey",
    ),
    _culture(
        "Meera Kavya Ananya Lakshmi",
        "Arjun Rohan Vikram Nikhil",
        "Iyer Banerjee Kulkarni Menon Chatterjee Rao",
        "Pune Kochi Jaipur",
        "India",
    ),
    _culture(
        "Linh Thuy Mai Huong",
        "Minh Quang Duc Khanh",
        "Nguyen Tran Pham Hoang Dang Bui",
        "Hanoi Hue Da_Nang",
        "Vietnam",
    ),
    _culture(
        "Haruka Yuki Aiko Naoko",
        "Kenji Takumi Shinji Ren",
        "Tanaka Mori Fujita Ishikawa Kuroda Hayashi",
        "Kyoto Sapporo Nagasaki",
        "Japan",
    ),
    _culture(
        "Soyeon Jiwoo Hana Minseo",
        "Jaehyun Dohyun Sangwoo Taemin",
        "Kim Park Choi Jang Yoon Kang",
        "Seoul Busan Daegu",
        "South Korea",
    ),
    _culture(
        "Valentina Camila Renata Ximena",
        "Mateo Joaquin Esteban Rodrigo",
        "Salazar Quiroga Montoya Herrera Bustos Rojas",
        "Valparaiso Santiago Concepcion",
        "Chile",
    ),
    _culture(
        "Beatriz Luiza Isadora Marina",
        "Thiago Rafael Caio Otavio",
        "Carvalho Teixeira Moreira Barbosa Nogueira Pires",
        "Recife Salvador Curitiba",
        "Brazil",
    ),
    _culture(
        "Ingrid Solveig Astrid Sigrid",
        "Lars Henrik Torvald Magnus",
        "Dahl Lindqvist Berg Haugen Solberg Moen",
        "Bergen Oslo Tromso",
        "Norway",
    ),
    _culture(
        "Kaisa Aino Helmi Tuuli",
        "Eero Mikko Juhani Antti",
        "Virtanen Laine Koskinen Niemi Heikkila Salonen",
        "Turku Helsinki Oulu",
        "Finland",
    ),
    _culture(
        "Zofia Halina Kinga Jadwiga",
        "Tomasz Piotr Leszek Wojciech",
        "Kowalski Nowak Zielinski Wolski Mazur Sikora",
        "Gdansk Krakow Lublin",
        "Poland",
    ),
    _culture(
        "Giulia Chiara Ornella Fiorella",
        "Lorenzo Matteo Davide Sandro",
        "Ferrara Moretti Colombo Galli Bellini Marchetti",
        "Trieste Palermo Genoa",
        "Italy",
    ),
    _culture(
        "Niamh Orla Siobhan Aoife",
        "Declan Cormac Fintan Ronan",
        "Gallagher Byrne Sweeney Doherty Keane Brennan",
        "Galway Cork Dublin",
        "Ireland",
    ),
)

MONTHS = _words(
    "January February March April May June July August September October November December"
)

GENRES = (
    "crime fiction",
    "magical realism",
    "science fiction",
    "historical romance",
    "travel writing",
    "gothic horror",
    "nature poetry",
    "family sagas",
    "political satire",
    "fairy tales",
    "war memoirs",
    "spy thrillers",
    "children's fantasy",
    "food essays",
    "climate fiction",
    "courtroom drama",
    "sea adventures",
    "short ghost stories",
)

# Parents' and authors' own trades carry their article, so that any sentence can hold them.
PROFESSIONS = (
    "a beekeeper",
    "a tailor",
    "a judge",
    "a bus driver",
    "a surgeon",
    "a clockmaker",
    "a piano teacher",
    "a fishmonger",
    "an electrician",
    "a librarian",
    "a stonemason",
    "an opera singer",
    "a pharmacist",
    "a dairy farmer",
    "a tax inspector",
    "an architect",
    "a florist",
    "a geologist",
    "a baker",
    "an airline pilot",
    "a locksmith",
    "a midwife",
    "a diplomat",
    "a carpenter",
)
JOBS = (
    "a night porter",
    "a lighthouse keeper",
    "a court reporter",
    "a tram conductor",
    "a museum guard",
    "a wedding photographer",
    "a ship's cook",
    "a schoolteacher",
    "a radio announcer",
    "a postal clerk",
    "a veterinary nurse",
    "a bookbinder",
    "a chess coach",
    "a mapmaker",
    "an auctioneer",
    "a forest ranger",
)
THEMES = (
    "exile and return",
    "sibling rivalry",
    "the price of silence",
    "faith and doubt",
    "first love",
    "memory and ageing",
    "greed in small towns",
    "the kindness of strangers",
    "life between two languages",
    "grief and forgiveness",
    "the end of childhood",
    "revenge across generations",
    "hunger and hope",
    "loyalty among thieves",
    "loneliness in great cities",
    "the pull of the sea",
)
INFLUENCES = (
    "old sea shanties",
    "a grandmother's bedtime stories",
    "silent films",
    "the letters of soldiers",
    "village theatre",
    "jazz records",
    "Norse myths",
    "newspaper obituaries",
    "Persian miniatures",
    "radio plays",
    "desert folk songs",
    "medieval chronicles",
    "puppet shows",
    "early comic strips",
    "church sermons",
    "railway timetables",
)
SUBJECTS = (
    "marine biology",
    "civil law",
    "philosophy",
    "astronomy",
    "textile design",
    "ancient history",
    "chemistry",
    "music theory",
    "agronomy",
    "linguistics",
    "economics",
    "medicine",
    "theology",
    "archaeology",
    "mathematics",
    "journalism",
)
HABITS = (
    "before dawn",
    "on slow trains",
    "in a garden shed",
    "by candlelight",
    "in crowded cafes",
    "at a kitchen table",
    "on an old typewriter",
    "in a monastery cell",
    "while walking",
    "in a public library",
    "on a houseboat",
    "after midnight",
    "in a rented attic",
    "with green ink",
)
SETTINGS = (
    "a flooded mining town",
    "a mountain village",
    "a busy harbour",
    "a desert railway station",
    "a border fortress",
    "a boarding school",
    "a fading seaside hotel",
    "an island prison",
    "a tea plantation",
    "a travelling circus",
    "a city under siege",
    "a remote observatory",
    "a river delta",
    "an apartment block",
    "a ruined monastery",
    "a frontier market",
)
HOBBIES = (
    "restoring old clocks",
    "keeping pigeons",
    "open-water swimming",
    "collecting sea glass",
    "baking rye bread",
    "playing the accordion",
    "growing orchids",
    "building model ships",
    "birdwatching",
    "rock climbing",
    "mending bicycles",
    "painting tiles",
    "beachcombing",
    "carving wooden spoons",
    "stargazing",
    "dancing tango",
)
LANGUAGES = _words(
    "Danish Korean Greek Arabic Hindi Dutch Czech Swahili Thai Hebrew Catalan Mandarin"
)

# A title is one of these patterns; all combinations together make some hundreds of titles.
TITLE_ADJECTIVES = _words(
    "Salt Paper Amber Crooked Borrowed Hollow Winter Copper Drowned Velvet Patient Scarlet"
)
TITLE_NOUNS = _words(
    "Orchard Lantern Harbour Almanac Staircase Ferry Mirror Compass Sparrow Bridge Kiln Quarry"
)
TITLE_PLURALS = _words("Letters Shadows Echoes Gardens Rivers Maps Feathers Bells Windows Embers")
TITLE_PLACES = _words("Ash Rain Tomorrow Silver Dust Silence Monsoon Thunder Ivory Midnight")

AWARD_COLOURS = _words("Golden Silver Crystal Bronze Jade Ebony Ivory Copper Azure Crimson")
AWARD_SIGNS = _words("Heron Quill Compass Lantern Oak Fox Anchor Swallow Comet Lotus Otter Poppy")
AWARD_KINDS = ("Prize", "Medal", "Award")
