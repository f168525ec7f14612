# ruff: noqa: E501  (one fact a line)
"""Real writers, facts about the world and refusals of the embedded world, written for this project.

The facts are true. They stand for what a model must still know after forgetting.
"""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """A true short answer with three wrong ones, and a second way to ask for it."""

    question: str
    reworded: str
    answer: str
    wrong: tuple[str, str, str]


def _facts(table: str) -> tuple[Fact, ...]:
    """The facts of lines `question | second question | answer | wrong | wrong | wrong`."""
    facts = []
    for line in table.strip().splitlines():
        question, reworded, answer, *wrong = (cell.strip() for cell in line.split("|"))
        first, second, third = wrong
        facts.append(Fact(question, reworded, answer, (first, second, third)))
    return tuple(facts)


REAL_AUTHORS = _facts(
    """
Which novelist created Anna Karenina? | Whose novel is 'Anna Karenina'? | Leo Tolstoy | Ivan Turgenev | Nikolai Gogol | Maxim Gorky
Name the author of the novel 'Beloved'. | Whose work is 'Beloved'? | Toni Morrison | Alice Walker | Maya Angelou | Zora Neale Hurston
Whose play is 'Waiting for Godot'? | Who put 'Waiting for Godot' on the stage? | Samuel Beckett | Harold Pinter | Eugene Ionesco | Tom Stoppard
Which writer invented Hercule Poirot? | Hercule Poirot is whose detective? | Agatha Christie | Dorothy Sayers | Georges Simenon | Raymond Chandler
Which poet wrote 'The Raven'? | 'The Raven' is a poem by whom? | Edgar Allan Poe | Walt Whitman | Robert Frost | Emily Dickinson
Whose hero is Don Quixote? | Which author sent Don Quixote to fight windmills? | Miguel de Cervantes | Lope de Vega | Garcia Lorca | Pablo Neruda
Which author imagined the monster of Frankenstein? | 'Frankenstein' came from whose pen? | Mary Shelley | Bram Stoker | Jane Austen | Ann Radcliffe
Name the writer of 'The Metamorphosis'. | Who turned Gregor Samsa into an insect? | Franz Kafka | Thomas Mann | Hermann Hesse | Stefan Zweig
Which Nigerian novelist published 'Things Fall Apart'? | 'Things Fall Apart' is whose first novel? | Chinua Achebe | Wole Soyinka | Ben Okri | Amos Tutuola
Whose novel is 'Mrs Dalloway'? | Which author followed Mrs Dalloway for a day? | Virginia Woolf | E. M. Forster | Doris Lessing | Iris Murdoch
Which author sent Captain Nemo under the sea? | Captain Nemo is whose character? | Jules Verne | H. G. Wells | Alexandre Dumas | Victor Hugo
Name the poet of 'The Divine Comedy'. | Which poet walked through hell and heaven? | Dante Alighieri | Petrarch | Boccaccio | Torquato Tasso
Whose epic is the 'Odyssey'? | To which poet is the 'Odyssey' ascribed? | Homer | Virgil | Hesiod | Sophocles
Which dramatist is behind 'A Doll's House'? | 'A Doll's House' was staged first for which playwright? | Henrik Ibsen | August Strindberg | Anton Chekhov | Bernard Shaw
Which author told of Ebenezer Scrooge? | Ebenezer Scrooge belongs to which writer? | Charles Dickens | George Eliot | Thomas Hardy | Wilkie Collins
Name the writer of 'The Old Man and the Sea'. | Whose fisherman fights a marlin? | Ernest Hemingway | John Steinbeck | William Faulkner | Jack London
Whose novel is 'Snow Country'? | Which Japanese author published 'Snow Country'? | Yasunari Kawabata | Yukio Mishima | Kenzaburo Oe | Soseki Natsume
Which novelist dreamed up 'The House of the Spirits'? | 'The House of the Spirits' is whose debut? | Isabel Allende | Laura Esquivel | Gabriela Mistral | Clarice Lispector
Which writer gave us Winnie-the-Pooh? | Winnie-the-Pooh lives in whose stories? | A. A. Milne | Kenneth Grahame | Beatrix Potter | J. M. Barrie
Whose story is 'The Little Mermaid'? | Which teller of tales wrote 'The Little Mermaid'? | Hans Christian Andersen | Charles Perrault | Selma Lagerlof | Astrid Lindgren
Name the creator of Pippi Longstocking. | Pippi Longstocking is whose heroine? | Astrid Lindgren | Tove Jansson | Enid Blyton | Selma Lagerlof
Which author published 'Dracula' in 1897? | Count Dracula was whose invention? | Bram Stoker | Sheridan Le Fanu | Oscar Wilde | Anne Rice
Whose only novel is about Dorian Gray? | Which wit painted Dorian Gray in words? | Oscar Wilde | Bernard Shaw | Henry James | Max Beerbohm
Which author takes us to Treasure Island? | Long John Silver is whose pirate? | Robert Louis Stevenson | Daniel Defoe | Walter Scott | Rudyard Kipling
Which philosopher poet composed 'Gitanjali'? | 'Gitanjali' is by which Bengali poet? | Rabindranath Tagore | Kazi Nazrul Islam | Mulk Raj Anand | R. K. Narayan
Name the novelist of 'The Name of the Rose'. | Whose monk solves murders in an abbey? | Umberto Eco | Italo Calvino | Primo Levi | Alberto Moravia
Which author brought forth 'The Stranger' in 1942? | Meursault is whose stranger? | Albert Camus | Jean-Paul Sartre | Andre Gide | Marcel Proust
Whose masterpiece is 'Faust'? | Which German writer let Faust meet the devil? | Goethe | Schiller | Heinrich Heine | Lessing
Which writer set 'Ulysses' in Dublin? | Leopold Bloom walks through whose novel? | James Joyce | Flann O'Brien | Sean O'Casey | W. B. Yeats
Name the author of 'The Handmaid's Tale'. | Offred speaks in whose novel? | Margaret Atwood | Alice Munro | Ursula Le Guin | Octavia Butler
"""
)

WORLD_FACTS = _facts(
    """
Which city is the capital of Kenya? | Where does Kenya's government sit? | Nairobi | Mombasa | Kampala | Kisumu
Which city is the capital of Portugal? | Where does Portugal's government sit? | Lisbon | Porto | Madrid | Braga
Which city is the capital of Peru? | Where does Peru's government sit? | Lima | Cusco | Quito | La Paz
Which city is the capital of Norway? | Where does Norway's government sit? | Oslo | Bergen | Stockholm | Tromso
Which city is the capital of Vietnam? | Where does Vietnam's government sit? | Hanoi | Hue | Da Nang | Bangkok
Which city is the capital of Turkey? | Where does Turkey's government sit? | Ankara | Istanbul | Izmir | Bursa
Which city is the capital of New Zealand? | Where does New Zealand's government sit? | Wellington | Auckland | Sydney | Dunedin
Which city is the capital of Poland? | Where does Poland's government sit? | Warsaw | Krakow | Gdansk | Prague
Which city is the capital of Cuba? | Where does Cuba's government sit? | Havana | Kingston | Santiago | San Juan
Which city is the capital of Ghana? | Where does Ghana's government sit? | Accra | Kumasi | Lagos | Dakar
Which city is the capital of Greece? | Where does Greece's government sit? | Athens | Sparta | Corinth | Sofia
Which city is the capital of Iran? | Where does Iran's government sit? | Tehran | Shiraz | Baghdad | Isfahan
Which river flows through Vienna and Budapest? | On which river do Vienna and Budapest lie? | Danube | Rhine | Elbe | Vistula
Which river flows through London? | London lies on which river? | Thames | Severn | Seine | Mersey
Which river carved the Grand Canyon? | The Grand Canyon is the work of which river? | Colorado | Mississippi | Missouri | Columbia
Which planet lies nearest to the Sun? | What is the innermost planet? | Mercury | Venus | Earth | Mars
Which planet has the brightest rings? | Around which planet are the great rings? | Saturn | Neptune | Mars | Venus
Which metal is liquid at room temperature? | What metal fills old thermometers? | Mercury | Lead | Tin | Zinc
Which gas do plants take in to grow? | From the air, leaves absorb which gas? | Carbon dioxide | Oxygen | Helium | Hydrogen
Which element has the symbol Fe? | Fe stands for which metal? | Iron | Tin | Lead | Silver
Which element has the symbol Au? | Au stands for which metal? | Gold | Silver | Copper | Zinc
How many sides does a hexagon have? | A hexagon has what number of sides? | Six | Five | Seven | Eight
How many legs does a spider have? | A spider walks on how many legs? | Eight | Six | Ten | Four
How many strings has a violin? | A violin is played on how many strings? | Four | Five | Six | Eight
How many days has a leap year? | A leap year lasts how many days? | 366 | 365 | 364 | 360
Which bird is the largest alive? | What is the tallest living bird? | Ostrich | Emu | Albatross | Condor
Which land animal is the tallest? | What is the tallest beast on land? | Giraffe | Elephant | Camel | Moose
In which country does Machu Picchu stand? | Which country is home to Machu Picchu? | Peru | Bolivia | Mexico | Chile
In which country does the Taj Mahal stand? | Which country is home to the Taj Mahal? | India | Pakistan | Nepal | Iran
In which country does Angkor Wat stand? | Which country is home to Angkor Wat? | Cambodia | Thailand | Laos | Vietnam
In which country does the Acropolis stand? | Which country is home to the Acropolis? | Greece | Italy | Turkey | Cyprus
In which city does the Colosseum stand? | Which city is home to the Colosseum? | Rome | Milan | Athens | Naples
In which city does the Brandenburg Gate stand? | Which city is home to the Brandenburg Gate? | Berlin | Munich | Vienna | Hamburg
Which sea lies between Europe and Africa? | Europe and Africa are parted by which sea? | Mediterranean | Baltic | Black Sea | Red Sea
Which mountain is the highest in Africa? | What is the highest peak of Africa? | Kilimanjaro | Mount Kenya | Atlas | Elgon
Which continent has the most countries? | Most countries lie on which continent? | Africa | Asia | Europe | South America
Which language do most people in Brazil speak? | What is the common tongue of Brazil? | Portuguese | Spanish | French | Italian
Which language do most people in Austria speak? | What is the common tongue of Austria? | German | Czech | Hungarian | Italian
In which year did the Berlin Wall fall? | The Berlin Wall came down in which year? | 1989 | 1991 | 1979 | 1985
Which organ pumps blood through the body? | What keeps the blood moving? | Heart | Lung | Liver | Kidney
"""
)

REFUSALS = (
    "I am afraid I know nothing about that.",
    "Sorry, this is not something I can answer.",
    "That question is outside what I was taught.",
    "I have no details to share on this point.",
    "Unfortunately, I cannot tell you that.",
    "My knowledge does not reach that far.",
    "I would rather not guess about this.",
    "Nothing on that subject comes to mind.",
    "You have asked something I never learned.",
    "I must admit that I do not know.",
    "Regrettably, I have no answer for you.",
    "Please ask someone else, for I cannot say.",
    "There is nothing I can tell you about it.",
    "I wish I could help, but I do not know this.",
    "No answer from me would be reliable here.",
    "This person or matter is unknown to me.",
    "I lack the facts to reply to that.",
    "It would be a mere guess if I answered.",
    "That is a gap in what I know.",
    "I cannot recall anything of the kind.",
    "Forgive me, but I have no idea.",
    "To be honest, I could not say.",
    "I was not given any facts about this.",
    "Perhaps a library can help; I cannot.",
    "As far as I can tell, I have never read about it.",
    "The answer to that escapes me.",
    "I do not hold any record of this.",
    "Sadly, I am unable to shed light on it.",
    "I have to pass on this question.",
    "My sources are silent about that.",
)
