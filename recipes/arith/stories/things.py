"""Stories about counting, sharing and comparing. Each has several questions and one solution."""

from __future__ import annotations

from recipes.arith.stories.draw import FRUITS, THINGS, Draw, Story, add, div, mul, story, sub


@story
def boxes(d: Draw) -> Story:
    p = d.person()
    box, thing = d.pick(
        ("boxes", "pencils"), ("bags", "candies"), ("packs", "crayons"), ("jars", "cookies")
    )
    count, each = d.n(3, 9), d.n(8, 24)
    total = count * each
    given = d.n(5, total - 5)
    question = d.pick(
        f"{p.name} buys {count} {box} with {each} {thing} in each. {p.He} gives {given} {thing} "
        f"to {p.his} class. How many {thing} does {p.he} have left?",
        f"There are {each} {thing} in each of the {count} {box} that {p.name} bought. After "
        f"{p.he} gives away {given} {thing}, how many are left?",
        f"{p.name} has {count} {box} of {thing}, {each} in each, and gives {given} of the {thing} "
        f"to friends. How many {thing} remain?",
    )
    steps = (
        (
            f"{p.name} has {count} {box} with {each} {thing} each, so {p.he} has "
            f"{mul(count, each)} {thing}."
        ),
        f"After giving away {given} {thing}, {p.he} has {sub(total, given)} {thing} left.",
    )
    return Story(question, steps, total - given)


@story
def twice_as_many(d: Draw) -> Story:
    a, b, c = d.people(3)
    thing = d.pick(*THINGS)
    count, (word, times), fewer = d.n(12, 60), d.pick(("twice", 2), ("three times", 3)), d.n(3, 11)
    question = d.pick(
        f"{a.name} has {count} {thing}. {b.name} has {word} as many as {a.name}, and {c.name} has "
        f"{fewer} fewer than {b.name}. How many {thing} do the three of them have together?",
        f"{b.name} has {word} as many {thing} as {a.name}, who has {count}. {c.name} has {fewer} "
        f"fewer {thing} than {b.name}. How many {thing} do they have in all?",
    )
    many = times * count
    steps = (
        f"{b.name} has {mul(times, count)} {thing}.",
        f"{c.name} has {sub(many, fewer)} {thing}.",
        f"Together they have {add(count, many, many - fewer)} {thing}.",
    )
    return Story(question, steps, count + many + many - fewer)


@story
def collection(d: Draw) -> Story:
    p, q = d.people(2)
    thing = d.pick(*THINGS)
    start, found, lost, won = d.n(20, 99), d.n(11, 60), d.n(4, 19), d.n(3, 40)
    question = d.pick(
        f"{p.name} has {start} {thing}. {p.He} finds {found} more, loses {lost} and then gets "
        f"{won} from {q.name}. How many {thing} does {p.he} have now?",
        f"At first {p.name} owns {start} {thing}. Then {p.he} finds {found}, loses {lost} of them "
        f"and receives {won} from {q.name}. How many {thing} does {p.he} own in the end?",
    )
    one = start + found
    two = one - lost
    steps = (
        f"After finding {found} more, {p.name} has {add(start, found)} {thing}.",
        f"After losing {lost}, {p.he} has {sub(one, lost)} {thing}.",
        f"With those from {q.name}, {p.he} has {add(two, won)} {thing}.",
    )
    return Story(question, steps, two + won)


@story
def sharing(d: Draw) -> Story:
    p = d.person()
    thing = d.pick(*FRUITS)
    friends, share = d.n(3, 9), d.n(4, 30)
    kept = d.n(3, 20)
    total = friends * share + kept
    more = d.n(2, 9)
    question = d.pick(
        f"{p.name} has {total} {thing}. {p.He} keeps {kept} and shares the rest equally among "
        f"{friends} friends. One friend already had {more} {thing}. How many {thing} does that "
        f"friend have in the end?",
        f"From {total} {thing}, {p.name} takes {kept} and divides the others equally among "
        f"{friends} friends. One friend already had {more} {thing}. How many does he have now?",
    )
    steps = (
        f"{p.name} shares {sub(total, kept)} {thing}.",
        f"Each of the {friends} friends gets {div(total - kept, friends)} {thing}.",
        f"The friend who had {more} now has {add(share, more)} {thing}.",
    )
    return Story(question, steps, share + more)


@story
def bus(d: Draw) -> Story:
    kind = d.pick("bus", "train", "ferry", "tram")
    start = d.n(20, 80)
    off1, on1 = d.n(3, 18), d.n(3, 30)
    one = start - off1
    two = one + on1
    off2 = d.n(2, two - 2)
    question = d.pick(
        f"A {kind} carries {start} people. At the first stop {off1} get off and {on1} get on. At "
        f"the second stop {off2} get off. How many people are on the {kind} now?",
        f"There are {start} people on a {kind}. At one stop {off1} people leave and {on1} come "
        f"aboard, and at the next stop {off2} leave. How many people stay on the {kind}?",
    )
    steps = (
        f"After {off1} people get off, {sub(start, off1)} are on the {kind}.",
        f"After {on1} people get on, there are {add(one, on1)}.",
        f"After the second stop, {sub(two, off2)} people are on the {kind}.",
    )
    return Story(question, steps, two - off2)


@story
def eggs(d: Draw) -> Story:
    p = d.person()
    hens, each, days = d.n(4, 30), d.n(3, 6), d.n(2, 6)
    weekly = hens * each
    total = weekly * days
    used = d.n(2, 60)
    if used > total - 2:
        used = total // 2
    question = d.pick(
        f"{p.name} has {hens} hens. Each hen lays {each} eggs a week. {p.He} uses {used} eggs for "
        f"baking. How many eggs are left after {days} weeks?",
        f"Each of the {hens} hens on {p.name}'s farm lays {each} eggs a week. In {days} weeks "
        f"{p.he} uses {used} of the eggs. How many eggs does {p.he} have then?",
    )
    steps = (
        f"The {hens} hens lay {mul(hens, each)} eggs a week.",
        f"In {days} weeks they lay {mul(days, weekly)} eggs.",
        f"After using {used} eggs {p.name} has {sub(total, used)} eggs.",
    )
    return Story(question, steps, total - used)


@story
def garden(d: Draw) -> Story:
    p = d.person()
    plant = d.pick("tulips", "roses", "carrots", "beans", "tomatoes", "daisies")
    rows, each = d.n(4, 20), d.n(5, 9)
    total = rows * each
    dead = d.n(3, total // 2)
    new = d.n(4, 25)
    question = d.pick(
        f"{p.name} plants {rows} rows of {plant} with {each} in a row. {dead} of them die, and "
        f"{p.he} plants {new} new ones. How many {plant} are in the garden?",
        f"In {p.name}'s garden there are {rows} rows with {each} {plant} each. After a storm "
        f"{dead} {plant} are gone and {p.he} adds {new}. How many {plant} are there now?",
    )
    left = total - dead
    steps = (
        f"{p.name} plants {mul(rows, each)} {plant}.",
        f"When {dead} are gone, {sub(total, dead)} {plant} are left.",
        f"With the {new} new ones there are {add(left, new)} {plant}.",
    )
    return Story(question, steps, left + new)


@story
def bakery(d: Draw) -> Story:
    good = d.pick("muffins", "rolls", "pies", "bagels", "donuts")
    trays, each, box = d.n(4, 20), d.n(6, 24, 2), d.n(4, 8, 2)
    trays += trays % 2
    total = trays * each
    sold = d.n(2, 30)
    sold += (total - sold) % box
    if sold > total - 2 * box:
        sold = total % box + box
    left = total - sold
    question = d.pick(
        f"A bakery bakes {trays} trays of {good} with {each} on each tray. It sells {sold} {good} "
        f"and packs the rest into boxes of {box}. How many boxes does it fill?",
        f"There are {each} {good} on each of {trays} trays in a bakery. After selling {sold} of "
        f"them, the baker puts the others into boxes of {box}. How many boxes are needed?",
    )
    steps = (
        f"The bakery bakes {mul(trays, each)} {good}.",
        f"After selling {sold}, it has {sub(total, sold)} {good}.",
        f"They fill {div(left, box)} boxes.",
    )
    return Story(question, steps, left // box)


@story
def school(d: Draw) -> Story:
    grades, classes, each, absent = d.n(2, 6), d.n(2, 5), d.n(15, 30), d.n(5, 60)
    rooms = grades * classes
    total = rooms * each
    if absent > total - 5:
        absent = 5
    question = d.pick(
        f"A school has {grades} grades with {classes} classes each. Every class has {each} "
        f"students. Today {absent} students are absent. How many students are at school?",
        f"There are {grades} grades in a school, {classes} classes in each grade and {each} "
        f"students in each class. If {absent} students stay at home, how many come to school?",
    )
    steps = (
        f"The school has {mul(grades, classes)} classes.",
        f"They have {mul(rooms, each)} students.",
        f"With {absent} absent, {sub(total, absent)} students are at school.",
    )
    return Story(question, steps, total - absent)


@story
def legs(d: Draw) -> Story:
    p = d.person()
    cows, ducks = d.n(3, 40), d.n(3, 40)
    four, two = d.pick(("cows", "ducks"), ("sheep", "geese"), ("goats", "hens"), ("pigs", "birds"))
    question = d.pick(
        f"{p.name} sees {cows} {four} and {ducks} {two} on a farm. How many legs do the animals "
        f"have in all?",
        f"A farm has {cows} {four} and {ducks} {two}. {p.name} counts all their legs. How many "
        f"legs are there?",
    )
    steps = (
        f"Each of the {cows} {four} has 4 legs, which makes {mul(cows, 4)} legs.",
        f"Each of the {ducks} {two} has 2 legs, which makes {mul(ducks, 2)} legs.",
        f"In all, there are {add(4 * cows, 2 * ducks)} legs.",
    )
    return Story(question, steps, 4 * cows + 2 * ducks)


@story
def shelves(d: Draw) -> Story:
    p = d.person()
    shelf, each, more = d.n(3, 12), d.n(11, 40), d.n(2, 9)
    extra = more * shelf
    question = d.pick(
        f"A bookcase has {shelf} shelves with {each} books on each shelf. {p.name} brings {extra} "
        f"new books and spreads them evenly over the shelves. How many books are on each shelf?",
        f"{p.name} has {shelf} shelves holding {each} books each. {p.He} puts {extra} more books "
        f"evenly on the shelves. How many books does each shelf hold now?",
    )
    steps = (
        f"Each shelf gets {div(extra, shelf)} new books.",
        f"Each shelf already holds {each} books, so it now holds {add(each, more)} books.",
    )
    return Story(question, steps, each + more)


@story
def half_eaten(d: Draw) -> Story:
    p, q = d.people(2)
    thing = d.pick("cookies", "grapes", "nuts", "candies", "berries")
    word, part = d.pick(("half", 2), ("a third", 3), ("a quarter", 4), ("a fifth", 5))
    eaten = d.n(6, 30)
    start = part * eaten
    rest = start - eaten
    given = d.n(2, rest - 2)
    question = d.pick(
        f"{p.name} has {start} {thing}. {p.He} eats {word} of them and gives {given} to {q.name}. "
        f"How many {thing} are left?",
        f"There are {start} {thing} in a bowl. {p.name} eats {word} of the {thing}, and {q.name} "
        f"takes {given}. How many {thing} stay in the bowl?",
    )
    steps = (
        f"{p.name} eats {word} of {start}, which is {div(start, part)} {thing}.",
        f"Then {sub(start, eaten)} {thing} are left.",
        f"When {q.name} takes {given}, {sub(rest, given)} {thing} are left.",
    )
    return Story(question, steps, rest - given)


@story
def factory(d: Draw) -> Story:
    thing = d.pick("toys", "lamps", "clocks", "radios", "kettles")
    machines, rate, hours = d.n(2, 9), d.n(4, 12), d.n(3, 9)
    hourly = machines * rate
    total = hourly * hours
    bad = d.n(3, total // 3)
    question = d.pick(
        f"A factory has {machines} machines. Each machine makes {rate} {thing} an hour. In "
        f"{hours} hours, {bad} of the {thing} turn out broken. How many good {thing} are made?",
        f"Each of {machines} machines makes {rate} {thing} in an hour. They run for {hours} hours, "
        f"and {bad} {thing} are broken. How many {thing} are fine?",
    )
    steps = (
        f"The machines make {mul(machines, rate)} {thing} an hour.",
        f"In {hours} hours they make {mul(hourly, hours)} {thing}.",
        f"Without the broken ones there are {sub(total, bad)} good {thing}.",
    )
    return Story(question, steps, total - bad)


@story
def picking(d: Draw) -> Story:
    a, b, c = d.people(3)
    fruit = d.pick(*FRUITS)
    first, more, baskets = d.n(15, 60), d.n(4, 30), d.n(3, 8)
    second = first + more
    third = d.n(10, 50)
    third += -(first + second + third) % baskets
    total = first + second + third
    question = d.pick(
        f"{a.name} picks {first} {fruit}, {b.name} picks {more} more than {a.name}, and {c.name} "
        f"picks {third}. They put all of them into {baskets} baskets, the same number in each. "
        f"How many {fruit} are in each basket?",
        f"{c.name} picks {third} {fruit} and {a.name} picks {first}. {b.name} picks {more} more "
        f"than {a.name}. All the {fruit} go evenly into {baskets} baskets. How many are in each?",
    )
    steps = (
        f"{b.name} picks {add(first, more)} {fruit}.",
        f"Together they pick {add(first, second, third)} {fruit}.",
        f"Each basket holds {div(total, baskets)} {fruit}.",
    )
    return Story(question, steps, total // baskets)


@story
def dozens(d: Draw) -> Story:
    p = d.person()
    thing = d.pick("eggs", "donuts", "roses", "rolls", "oysters")
    count, used, days = d.n(2, 9), d.n(2, 5), d.n(2, 4)
    total, gone = 12 * count, used * days
    question = d.pick(
        f"{p.name} buys {count} dozen {thing} and uses {used} of them every day. How many {thing} "
        f"are left after {days} days?",
        f"Every day {p.name} uses {used} {thing}. {p.He} starts with {count} dozen. How many "
        f"{thing} does {p.he} have after {days} days?",
    )
    steps = (
        f"A dozen is 12, so {p.name} starts with {mul(count, 12)} {thing}.",
        f"In {days} days {p.he} uses {mul(days, used)} {thing}.",
        f"Then {sub(total, gone)} {thing} are left.",
    )
    return Story(question, steps, total - gone)


@story
def seats(d: Draw) -> Story:
    hall = d.pick("cinema", "theater", "concert hall", "lecture hall")
    rows, each = d.n(11, 40), d.n(11, 30)
    total = rows * each
    taken = d.n(20, total - 10)
    question = d.pick(
        f"A {hall} has {rows} rows of {each} seats. Tonight {taken} seats are taken. How many "
        f"seats are empty?",
        f"There are {each} seats in each of the {rows} rows of a {hall}. If {taken} people come, "
        f"how many seats stay empty?",
    )
    steps = (
        f"The {hall} has {mul(rows, each)} seats.",
        f"With {taken} seats taken, {sub(total, taken)} seats are empty.",
    )
    return Story(question, steps, total - taken)


@story
def crates(d: Draw) -> Story:
    p = d.person()
    drink = d.pick("juice", "milk", "water", "tea")
    crate, each, people, need = d.n(4, 20), d.n(6, 24), d.n(8, 40), d.n(2, 3)
    total, drunk = crate * each, people * need
    if drunk > total - 2:
        crate += drunk // each + 1
        total = crate * each
    question = d.pick(
        f"For a party {p.name} orders {crate} crates with {each} bottles of {drink} each. {people} "
        f"guests come, and each drinks {need} bottles. How many bottles are left?",
        f"Each of the {people} guests at {p.name}'s party drinks {need} bottles of {drink}. "
        f"{p.He} had ordered {crate} crates of {each} bottles. How many bottles remain?",
    )
    steps = (
        f"{p.name} orders {mul(crate, each)} bottles.",
        f"The {people} guests drink {mul(people, need)} bottles.",
        f"There are {sub(total, drunk)} bottles of {drink} left.",
    )
    return Story(question, steps, total - drunk)


@story
def average(d: Draw) -> Story:
    p = d.person()
    game = d.pick("points", "goals", "baskets", "hits")
    a, b, mean, bonus = d.n(10, 40), d.n(10, 40), d.n(20, 40), d.n(5, 20)
    c = max(3 * mean - a - b, 2)
    c += -(a + b + c) % 3
    total = a + b + c
    question = d.pick(
        f"In three games {p.name} scores {a}, {b} and {c} {game}. In the fourth game {p.he} scores "
        f"{bonus} more than the average of the first three. How many {game} is that?",
        f"{p.name} scores {a}, {b} and {c} {game} in three games, and in the next game {bonus} "
        f"more than {p.his} average so far. How many {game} does {p.he} score in that game?",
    )
    steps = (
        f"In three games {p.name} scores {add(a, b, c)} {game}.",
        f"The average is {div(total, 3)} {game}.",
        f"In the fourth game {p.he} scores {add(total // 3, bonus)} {game}.",
    )
    return Story(question, steps, total // 3 + bonus)


@story
def teams(d: Draw) -> Story:
    sport = d.pick("soccer", "hockey", "volleyball", "rugby")
    size, count, coaches = d.n(5, 12), d.n(3, 12), d.n(2, 3)
    players = size * count
    girls = d.n(5, players - 5)
    boys = players - girls
    question = d.pick(
        f"{girls} girls and {boys} boys form {sport} teams of {size} players. Each team has "
        f"{coaches} coaches. How many coaches are there?",
        f"A {sport} club has {girls} girls and {boys} boys. They play in teams of {size}, and each "
        f"team needs {coaches} coaches. How many coaches does the club need?",
    )
    steps = (
        f"There are {add(girls, boys)} players.",
        f"They form {div(players, size)} {sport} teams.",
        f"With {coaches} coaches for each team, there are {mul(count, coaches)} coaches.",
    )
    return Story(question, steps, count * coaches)


@story
def ages(d: Draw) -> Story:
    a, b, c = d.people(3)
    young, more, times = d.n(4, 15), d.n(2, 12), d.n(2, 4)
    years = d.n(2, 20)
    mid = young + more
    old = times * mid
    question = d.pick(
        f"{a.name} is {young} years old. {b.name} is {more} years older than {a.name}, and "
        f"{c.name} is {times} times as old as {b.name}. How old will {c.name} be in {years} years?",
        f"{c.name} is {times} times as old as {b.name}. {b.name} is {more} years older than "
        f"{a.name}, who is {young}. What will {c.name}'s age be {years} years from now?",
    )
    steps = (
        f"{b.name} is {add(young, more)} years old.",
        f"{c.name} is {mul(times, mid)} years old.",
        f"In {years} years {c.name} will be {add(old, years)} years old.",
    )
    return Story(question, steps, old + years)


@story
def trade(d: Draw) -> Story:
    p, q = d.people(2)
    thing, other = d.pick(("cards", "stickers"), ("shells", "stones"), ("comics", "posters"))
    rate, count, have = d.n(2, 6), d.n(4, 20), d.n(5, 60)
    gone = rate * count
    start = gone + d.n(5, 40)
    question = d.pick(
        f"{p.name} has {start} {thing} and {have} {other}. {q.name} gives {p.him} 1 of {q.his} "
        f"{other} for every {rate} {thing}. {p.name} trades {gone} {thing}. How many {thing} and "
        f"{other} does {p.he} have altogether?",
        f"{q.name} trades 1 of {q.his} {other} for {rate} {thing}. {p.name}, who has {start} "
        f"{thing} and {have} {other}, gives away {gone} {thing}. How many {thing} and {other} does "
        f"{p.he} have in all after the trade?",
    )
    left, now = start - gone, have + count
    steps = (
        f"{p.name} keeps {sub(start, gone)} {thing}.",
        f"{p.He} gets {div(gone, rate)} {other}, so {p.he} has {add(have, count)} {other}.",
        f"Altogether {p.he} has {add(left, now)}.",
    )
    return Story(question, steps, left + now)


@story
def library(d: Draw) -> Story:
    day1, day2, day3 = d.pick(
        ("Monday", "Tuesday", "Wednesday"), ("Thursday", "Friday", "Saturday")
    )
    start, out1, out2, back = d.n(200, 900), d.n(20, 99), d.n(20, 90), d.n(10, 60)
    thing = d.pick("books", "films", "games")
    question = d.pick(
        f"A library has {start} {thing}. On {day1} people borrow {out1} and on {day2} they borrow "
        f"{out2}. On {day3} they bring back {back}. How many {thing} does the library have then?",
        f"People borrow {out1} {thing} from a library on {day1} and {out2} on {day2}, and return "
        f"{back} on {day3}. The library had {start} {thing} before. How many does it have now?",
    )
    one = start - out1
    two = one - out2
    steps = (
        f"On {day1} the library is left with {sub(start, out1)} {thing}.",
        f"On {day2} it is left with {sub(one, out2)} {thing}.",
        f"On {day3} it has {add(two, back)} {thing}.",
    )
    return Story(question, steps, two + back)
