"""Stories about time, distance, area and rates. Each has several questions and one solution."""

from __future__ import annotations

from recipes.arith.stories.draw import Draw, Story, add, div, mul, story, sub


@story
def reading(d: Draw) -> Story:
    p = d.person()
    first, days1, second, days2 = d.n(8, 30), d.n(3, 7), d.n(12, 40), d.n(2, 9)
    a, b = first * days1, second * days2
    pages = a + b
    question = d.pick(
        f"{p.name} reads a book of {pages} pages. For {days1} days {p.he} reads {first} pages a "
        f"day, and then {second} pages a day. How many more days does {p.he} need?",
        f"A book has {pages} pages. {p.name} reads {first} pages a day for {days1} days. After "
        f"that {p.he} reads {second} pages a day. How many days does the rest take?",
    )
    steps = (
        f"In {days1} days {p.name} reads {mul(days1, first)} pages.",
        f"Then {sub(pages, a)} pages are left.",
        f"At {second} pages a day, {mul(days2, second)}, so the rest takes {days2} days.",
    )
    return Story(question, steps, days2)


@story
def journey(d: Draw) -> Story:
    p = d.person()
    way = d.pick("drives", "rides", "travels")
    v1, h1, v2, h2 = d.n(20, 80, 5), d.n(2, 6), d.n(20, 90, 5), d.n(2, 6)
    a, b = v1 * h1, v2 * h2
    total = (a + b) // 100 * 100 + 100 * d.n(1, 3)
    question = d.pick(
        f"{p.name} {way} {h1} hours at {v1} miles an hour and then {h2} hours at {v2} miles an "
        f"hour. The whole trip is {total} miles. How many miles are left?",
        f"On a trip of {total} miles, {p.name} {way} at {v1} miles an hour for {h1} hours and at "
        f"{v2} miles an hour for {h2} hours. How far does {p.he} still have to go?",
    )
    steps = (
        f"In the first {h1} hours {p.name} {way} {mul(h1, v1)} miles.",
        f"In the next {h2} hours {p.he} {way} {mul(h2, v2)} miles.",
        f"That makes {add(a, b)} miles.",
        f"There are {sub(total, a + b)} miles left.",
    )
    return Story(question, steps, total - a - b)


@story
def fence(d: Draw) -> Story:
    p = d.person()
    field = d.pick("garden", "field", "yard", "pasture")
    length, width, price, gate = d.n(10, 60), d.n(5, 35), d.n(2, 9), d.n(2, 5)
    half = length + width
    around = 2 * half
    fence_length = around - gate
    question = d.pick(
        f"{p.name} puts a fence around a {field} that is {length} meters long and {width} meters "
        f"wide, and leaves out {gate} meters for a gate. A meter costs ${price}. What does the "
        f"fence cost?",
        f"A {field} is {width} meters wide and {length} meters long. {p.name} fences it, except "
        f"for a gate of {gate} meters, at ${price} a meter. How many dollars does {p.he} pay?",
    )
    steps = (
        (
            f"Length and width are {add(length, width)} meters, so around the {field} it is "
            f"{mul(2, half)} meters."
        ),
        f"Without the gate the fence is {sub(around, gate)} meters long.",
        f"It costs {mul(fence_length, price)} dollars.",
    )
    return Story(question, steps, fence_length * price)


@story
def area(d: Draw) -> Story:
    p = d.person()
    room = d.pick("kitchen", "bedroom", "hallway", "studio", "office")
    length, width, rug, wide = d.n(6, 15), d.n(4, 9), d.n(2, 5), d.n(2, 3)
    price = d.n(3, 9)
    whole, part = length * width, rug * wide
    question = d.pick(
        f"A {room} is {length} feet long and {width} feet wide. A closet of {rug} by {wide} feet "
        f"is left out. {p.name} tiles the rest at ${price} a square foot. What does it cost?",
        f"{p.name} tiles a {room} of {length} by {width} feet, except for a corner of {rug} by "
        f"{wide} feet. Tiles cost ${price} a square foot. How much does {p.he} pay?",
    )
    rest = whole - part
    steps = (
        f"The {room} has {mul(length, width)} square feet.",
        f"The part left out has {mul(rug, wide)} square feet.",
        f"So {sub(whole, part)} square feet are tiled, for {mul(rest, price)} dollars.",
    )
    return Story(question, steps, rest * price)


@story
def tank(d: Draw) -> Story:
    kind = d.pick("tank", "pool", "pond", "barrel")
    inflow, outflow, minutes, start = d.n(9, 30), d.n(2, 7), d.n(4, 30), d.n(20, 200)
    net = inflow - outflow
    gain = net * minutes
    question = d.pick(
        f"A {kind} holds {start} liters of water. Each minute {inflow} liters flow in and "
        f"{outflow} liters leak out. How many liters are in the {kind} after {minutes} minutes?",
        f"Water runs into a {kind} at {inflow} liters a minute, and {outflow} liters a minute leak "
        f"out. At first it holds {start} liters. How much does it hold {minutes} minutes later?",
    )
    steps = (
        f"Each minute the {kind} gains {sub(inflow, outflow)} liters.",
        f"In {minutes} minutes it gains {mul(net, minutes)} liters.",
        f"Then it holds {add(start, gain)} liters.",
    )
    return Story(question, steps, start + gain)


@story
def hours(d: Draw) -> Story:
    p = d.person()
    skill = d.pick("the piano", "the violin", "chess", "the drums", "French")
    daily, days, weeks = d.n(20, 90, 5), d.n(3, 6), d.n(2, 6)
    extra = d.n(10, 90, 5)
    weekly = daily * days
    question = d.pick(
        f"{p.name} practices {skill} for {daily} minutes on {days} days of every week. In "
        f"{weeks} weeks, with {extra} extra minutes before a contest, how many minutes does "
        f"{p.he} practice?",
        f"On {days} days a week {p.name} spends {daily} minutes on {skill}. How many minutes is "
        f"that in {weeks} weeks, if {p.he} adds {extra} minutes once?",
    )
    steps = (
        f"Each week {p.name} practices {mul(days, daily)} minutes.",
        f"In {weeks} weeks that is {mul(weekly, weeks)} minutes.",
        f"With the extra time {p.he} practices {add(weekly * weeks, extra)} minutes.",
    )
    return Story(question, steps, weekly * weeks + extra)


@story
def running(d: Draw) -> Story:
    p, q = d.people(2)
    laps, meters, more, days = d.n(3, 6), d.n(150, 300, 50), d.n(2, 4), d.n(2, 3)
    question = d.pick(
        f"A lap is {meters} meters. {p.name} runs {laps} laps a day, and {q.name} runs {more} laps "
        f"more. How many meters does {q.name} run in {days} days?",
        f"{q.name} runs {more} laps a day more than {p.name}, who runs {laps}. How many meters "
        f"does {q.name} run in {days} days if a lap is {meters} meters?",
    )
    daily = laps + more
    total = daily * days
    steps = (
        f"{q.name} runs {add(laps, more)} laps a day.",
        f"In {days} days {q.he} runs {mul(daily, days)} laps.",
        f"That is {mul(total, meters)} meters.",
    )
    return Story(question, steps, total * meters)


@story
def weeks_and_days(d: Draw) -> Story:
    p = d.person()
    animal = d.pick("dog", "cat", "rabbit", "horse", "parrot")
    weeks, days, cups, bag = d.n(2, 9), d.n(2, 6), d.n(2, 9), d.n(1, 3)
    total_days = 7 * weeks + days
    need = total_days * cups
    have = need + 10 * bag + d.n(0, 9)
    question = d.pick(
        f"{p.name}'s {animal} eats {cups} cups of food a day. {p.name} has {have} cups. How many "
        f"cups are left after {weeks} weeks and {days} days?",
        f"{p.name} has {have} cups of food for {p.his} {animal}, which eats {cups} cups a day. "
        f"How many cups does {p.he} have after {weeks} weeks and {days} days?",
    )
    steps = (
        (
            f"The {weeks} weeks have {mul(weeks, 7)} days, and with {days} more it is "
            f"{add(7 * weeks, days)} days."
        ),
        f"The {animal} eats {mul(total_days, cups)} cups.",
        f"Then {sub(have, need)} cups are left.",
    )
    return Story(question, steps, have - need)


@story
def recipe(d: Draw) -> Story:
    p = d.person()
    dish, grain = d.pick(("pancakes", "flour"), ("porridge", "oats"), ("bread", "flour"))
    people, grams, times, have = d.n(2, 5), d.n(40, 90, 5), d.n(2, 6), d.n(50, 300, 10)
    each = grams
    total_people = people * times
    need = total_people * each
    have = min(have, need - 20)
    question = d.pick(
        f"{p.name} makes {dish} for {times} tables with {people} people at each. One person needs "
        f"{each} grams of {grain}, and {p.he} has {have} grams. How many more grams does {p.he} "
        f"need?",
        f"One portion of {dish} takes {each} grams of {grain}. {p.name} has {have} grams and cooks "
        f"for {times} tables of {people} people. How many grams of {grain} are missing?",
    )
    steps = (
        f"{p.name} cooks for {mul(times, people)} people.",
        f"They need {mul(total_people, each)} grams of {grain}.",
        f"{p.name} has {have} grams, so {p.he} needs {sub(need, have)} grams more.",
    )
    return Story(question, steps, need - have)


@story
def ropes(d: Draw) -> Story:
    p = d.person()
    thing = d.pick("rope", "ribbon", "wire", "string")
    pieces, size, rest = d.n(3, 12), d.n(3, 9), d.n(2, 8)
    more, price = d.n(2, 9), d.n(2, 5)
    length = pieces * size + rest
    count = pieces + more
    question = d.pick(
        f"{p.name} cuts a {thing} of {length} feet into pieces of {size} feet until {rest} feet "
        f"are left. {p.He} has {more} more pieces at home and sells all pieces for ${price} each. "
        f"How much money does {p.he} get?",
        f"From a {thing} of {length} feet {p.name} cuts pieces of {size} feet, and {rest} feet "
        f"remain. With {more} pieces from home {p.he} sells every piece for ${price}. What does "
        f"{p.he} earn?",
    )
    steps = (
        f"{p.name} cuts up {sub(length, rest)} feet of {thing}.",
        f"That makes {div(length - rest, size)} pieces.",
        f"With those from home {p.he} has {add(pieces, more)} pieces.",
        f"{p.He} gets {mul(count, price)} dollars.",
    )
    return Story(question, steps, count * price)


@story
def temperature(d: Draw) -> Story:
    city = d.pick("Oslo", "Lima", "Cairo", "Delhi", "Boston", "Turin")
    start, rise, hour, drop = d.n(10, 50), d.n(2, 6), d.n(2, 6), d.n(3, 15)
    warm = start + rise * hour
    question = d.pick(
        f"In {city} it is {start} degrees in the morning. The temperature rises {rise} degrees an "
        f"hour for {hour} hours and then falls by {drop} degrees. How many degrees is it then?",
        f"The morning in {city} starts at {start} degrees. For {hour} hours it gets {rise} degrees "
        f"warmer each hour, and later {drop} degrees colder. What is the temperature then?",
    )
    steps = (
        f"In {hour} hours the temperature rises by {mul(hour, rise)} degrees.",
        f"It reaches {add(start, rise * hour)} degrees in {city}.",
        f"After the fall it is {sub(warm, drop)} degrees.",
    )
    return Story(question, steps, warm - drop)


@story
def printing(d: Draw) -> Story:
    p = d.person()
    thing = d.pick("letters", "posters", "maps", "photos")
    rate, first, second, jam = d.n(4, 20), d.n(5, 30), d.n(3, 20), d.n(2, 18)
    minutes = first + second
    total = rate * minutes
    question = d.pick(
        f"{p.name}'s printer prints {rate} {thing} a minute. It runs for {first} minutes and then "
        f"for {second} minutes more, but {jam} {thing} are spoiled. How many good {thing} does "
        f"{p.name} have?",
        f"A printer makes {rate} {thing} a minute. {p.name} lets it run for {first} minutes, then "
        f"for another {second} minutes, and throws away {jam} {thing}. How many are left?",
    )
    steps = (
        f"The printer runs for {add(first, second)} minutes.",
        f"It prints {mul(rate, minutes)} {thing}.",
        f"Without the bad ones {p.name} has {sub(total, jam)} {thing}.",
    )
    return Story(question, steps, total - jam)


@story
def weight(d: Draw) -> Story:
    crate, fruit = d.pick(
        ("crates", "melons"), ("sacks", "potatoes"), ("boxes", "pumpkins"), ("bags", "onions")
    )
    count, each, heavy, empty = d.n(4, 20), d.n(11, 40), d.n(2, 9), d.n(100, 400, 10)
    load = count * each
    limit = empty + load + heavy * d.n(2, 9)
    question = d.pick(
        f"An empty truck weighs {empty} pounds. It carries {count} {crate} of {fruit} at {each} "
        f"pounds each. The limit on a bridge is {limit} pounds. How many pounds is the truck "
        f"below the limit?",
        f"A bridge can bear {limit} pounds. A truck weighs {empty} pounds and is loaded with "
        f"{count} {crate} of {fruit}, {each} pounds each. How much more could it weigh?",
    )
    steps = (
        f"The {crate} of {fruit} weigh {mul(count, each)} pounds.",
        f"The loaded truck weighs {add(empty, load)} pounds.",
        f"It is {sub(limit, empty + load)} pounds below the limit.",
    )
    return Story(question, steps, limit - empty - load)


@story
def walking(d: Draw) -> Story:
    p = d.person()
    minutes, rate, back = d.n(6, 30), d.n(50, 90, 5), d.n(100, 400, 50)
    place = d.pick("school", "the park", "the station", "the market")
    one = minutes * rate
    question = d.pick(
        f"{p.name} walks to {place} in {minutes} minutes at {rate} meters a minute. On the way "
        f"back {p.he} takes a path that is {back} meters longer. How many meters does {p.he} walk "
        f"in all?",
        f"It takes {p.name} {minutes} minutes to walk to {place} at {rate} meters a minute. The "
        f"way home is {back} meters longer. How far does {p.he} walk there and back?",
    )
    home = one + back
    steps = (
        f"The way to {place} is {mul(minutes, rate)} meters.",
        f"The way back is {add(one, back)} meters.",
        f"In all, {p.name} walks {add(one, home)} meters.",
    )
    return Story(question, steps, one + home)


@story
def screen_time(d: Draw) -> Story:
    p = d.person()
    hours_each, films, breaks, pause = d.n(2, 3), d.n(2, 4), d.n(2, 5), d.n(5, 20, 5)
    rest = breaks * pause
    total_hours = hours_each * films
    minutes = 60 * total_hours
    question = d.pick(
        f"{p.name} watches {films} films of {hours_each} hours each and takes {breaks} breaks of "
        f"{pause} minutes. How many minutes does it take {p.him} in all?",
        f"At a film night {p.name} sees {films} films, each {hours_each} hours long, with {breaks} "
        f"breaks of {pause} minutes. How many minutes does the night last?",
    )
    steps = (
        f"The films last {mul(films, hours_each)} hours, which is {mul(total_hours, 60)} minutes.",
        f"The breaks last {mul(breaks, pause)} minutes.",
        f"In all, it takes {p.name} {add(minutes, rest)} minutes.",
    )
    return Story(question, steps, minutes + rest)
