"""Stories about prices, wages and savings. Each has several questions and one solution."""

from __future__ import annotations

from recipes.arith.stories.draw import FRUITS, Draw, Story, add, div, mul, story, sub


@story
def change(d: Draw) -> Story:
    p = d.person()
    thing = d.pick("notebooks", "pens", "folders", "rulers", "markers", "erasers")
    count, price = d.n(3, 12), d.n(2, 9)
    cost = count * price
    paid = next(bill for bill in (20, 50, 100, 200) if bill > cost + 1)
    question = d.pick(
        f"{p.name} buys {count} {thing} that cost ${price} each. {p.He} pays with ${paid}. "
        f"How much change does {p.he} get?",
        f"A shop sells {thing} for ${price} each. {p.name} takes {count} of the {thing} and hands "
        f"over ${paid}. How many dollars does {p.he} get back?",
        f"{p.name} has ${paid} and spends some of it on {count} {thing} at ${price} each. "
        f"How much money is left?",
    )
    steps = (
        f"The {count} {thing} cost {mul(count, price)} dollars.",
        f"{p.name} pays {paid} dollars, so {p.he} gets back {sub(paid, cost)} dollars.",
    )
    return Story(question, steps, paid - cost)


@story
def two_goods(d: Draw) -> Story:
    p = d.person()
    first, second = d.pick(
        ("shirts", "hats"), ("books", "pens"), ("plates", "cups"), ("chairs", "lamps")
    )
    a, b, x, y = d.n(2, 9), d.n(2, 9), d.n(11, 40), d.n(3, 10)
    question = d.pick(
        f"{p.name} buys {a} {first} for ${x} each and {b} {second} for ${y} each. "
        f"How much does {p.he} spend in all?",
        f"At the market, {first} cost ${x} each and {second} cost ${y} each. What does {p.name} "
        f"pay for {a} {first} and {b} {second}?",
    )
    steps = (
        f"The {a} {first} cost {mul(a, x)} dollars.",
        f"The {b} {second} cost {mul(b, y)} dollars.",
        f"In all, {p.name} spends {add(a * x, b * y)} dollars.",
    )
    return Story(question, steps, a * x + b * y)


@story
def tickets(d: Draw) -> Story:
    place = d.pick("zoo", "museum", "circus", "theater", "aquarium")
    adults, children = d.n(2, 9), d.n(2, 30)
    adult, child = d.n(11, 30), d.n(3, 9)
    budget = (adults * adult + children * child) // 100 * 100 + 100 * d.n(1, 3)
    a, c = adults * adult, children * child
    question = d.pick(
        f"A ticket to the {place} costs ${adult} for an adult and ${child} for a child. A group "
        f"of {adults} adults and {children} children has ${budget}. How many dollars are left "
        f"after they buy the tickets?",
        f"A group brings ${budget} to the {place}. There are {adults} adults, who pay ${adult} "
        f"each, and {children} children, who pay ${child} each. How much money remains?",
    )
    steps = (
        f"The {adults} adults pay {mul(adults, adult)} dollars.",
        f"The {children} children pay {mul(children, child)} dollars.",
        f"Together they pay {add(a, c)} dollars.",
        f"The group has {sub(budget, a + c)} dollars left.",
    )
    return Story(question, steps, budget - a - c)


@story
def wages(d: Draw) -> Story:
    p = d.person()
    hours, days, rate, spent = d.n(3, 8), d.n(3, 6), d.n(11, 30), d.n(10, 95)
    job = d.pick("a bakery", "a farm", "a garage", "a library", "a cafe")
    question = d.pick(
        f"{p.name} works {hours} hours a day at {job} and earns ${rate} an hour. After {days} "
        f"days {p.he} spends ${spent}. How much of {p.his} pay is left?",
        f"At {job}, {p.name} is paid ${rate} an hour. {p.He} works {hours} hours on each of "
        f"{days} days and then spends ${spent}. How many dollars does {p.he} still have?",
    )
    total = hours * days
    steps = (
        f"In {days} days {p.name} works {mul(days, hours)} hours.",
        f"{p.He} earns {mul(rate, total)} dollars.",
        f"After spending {spent} dollars {p.he} has {sub(total * rate, spent)} dollars left.",
    )
    return Story(question, steps, total * rate - spent)


@story
def overtime(d: Draw) -> Story:
    p = d.person()
    rate, extra, hours, over = d.n(9, 25), d.n(3, 9), d.n(20, 40, 10), d.n(2, 9)
    question = d.pick(
        f"{p.name} earns ${rate} an hour for the first {hours} hours of the week and ${extra} an "
        f"hour more after that. How much does {p.he} earn in a week of {hours + over} hours?",
        f"A job pays ${rate} an hour. Every hour past {hours} pays ${extra} more. {p.name} works "
        f"{hours + over} hours. What does {p.he} earn?",
    )
    base, high = rate * hours, rate + extra
    steps = (
        f"The first {hours} hours pay {mul(rate, hours)} dollars.",
        f"{p.name} works {sub(hours + over, hours)} hours more, at {add(rate, extra)} dollars.",
        f"They pay {mul(over, high)} dollars.",
        f"In all, {p.he} earns {add(base, over * high)} dollars.",
    )
    return Story(question, steps, base + over * high)


@story
def saving(d: Draw) -> Story:
    p = d.person()
    thing = d.pick("bike", "guitar", "camera", "tent", "skateboard")
    weekly, weeks, have = d.n(3, 12), d.n(4, 20), d.n(10, 60)
    price = have + weekly * weeks
    question = d.pick(
        f"{p.name} wants a {thing} that costs ${price}. {p.He} has ${have} and saves ${weekly} "
        f"every week. How many weeks does {p.he} need?",
        f"A {thing} costs ${price}. {p.name} already has ${have}. If {p.he} saves ${weekly} a "
        f"week, in how many weeks can {p.he} buy it?",
    )
    steps = (
        f"{p.name} still needs {sub(price, have)} dollars for the {thing}.",
        f"Saving {weekly} dollars a week takes {div(price - have, weekly)} weeks.",
    )
    return Story(question, steps, weeks)


@story
def discount(d: Draw) -> Story:
    p = d.person()
    thing = d.pick("coat", "table", "carpet", "watch", "sofa", "printer")
    percent, part = d.pick((10, 10), (20, 5), (25, 4), (50, 2))
    price, fee = part * d.n(8, 60), d.n(5, 30)
    off = price // part
    question = d.pick(
        f"A {thing} costs ${price}. {p.name} gets {percent}% off and pays ${fee} for delivery. "
        f"How much does {p.he} pay in total?",
        f"{p.name} buys a {thing} priced at ${price} with a discount of {percent}%. Delivery "
        f"costs ${fee}. What is the total?",
    )
    steps = (
        f"The discount is {percent}% of {price}, which is {div(price, part)} dollars.",
        f"The {thing} then costs {sub(price, off)} dollars.",
        f"With delivery {p.name} pays {add(price - off, fee)} dollars.",
    )
    return Story(question, steps, price - off + fee)


@story
def stall(d: Draw) -> Story:
    p = d.person()
    good, use = d.pick(("lemonade", "cups"), ("soup", "bowls"), ("juice", "glasses"))
    count, price, cost, days = d.n(8, 40), d.n(2, 6), d.n(5, 14), d.n(2, 6)
    income = count * price
    gain = income - cost
    question = d.pick(
        f"{p.name} sells {count} {use} of {good} a day at ${price} each. The supplies cost "
        f"{p.him} ${cost} a day. How much profit does {p.he} make in {days} days?",
        f"Every day {p.name} spends ${cost} on supplies and sells {count} {use} of {good} for "
        f"${price} each. What is {p.his} profit after {days} days?",
    )
    steps = (
        f"Each day {p.name} takes in {mul(count, price)} dollars.",
        f"After the supplies {p.his} profit is {sub(income, cost)} dollars a day.",
        f"In {days} days the profit is {mul(days, gain)} dollars.",
    )
    return Story(question, steps, gain * days)


@story
def split_bill(d: Draw) -> Story:
    friends, share = d.n(3, 9), d.n(9, 40)
    total = friends * share
    tip = d.n(4, min(30, total // 3))
    drinks = d.n(5, total // 3)
    meal = total - tip - drinks
    question = d.pick(
        f"A group of {friends} friends eats for ${meal}, drinks for ${drinks} and leaves a tip "
        f"of ${tip}. They share the bill equally. How much does each friend pay?",
        f"The food costs ${meal} and the drinks cost ${drinks}. With a tip of ${tip}, what does "
        f"each of {friends} friends pay if they split the bill evenly?",
    )
    steps = (
        f"The food and the drinks cost {add(meal, drinks)} dollars.",
        f"With the tip the bill is {add(meal + drinks, tip)} dollars.",
        f"Each of the {friends} friends pays {div(total, friends)} dollars.",
    )
    return Story(question, steps, share)


@story
def phone_plan(d: Draw) -> Story:
    p = d.person()
    base, gigs, each, months = d.n(10, 40), d.n(2, 9), d.n(2, 6), d.n(2, 9)
    question = d.pick(
        f"A phone plan costs ${base} a month plus ${each} for every gigabyte. {p.name} uses "
        f"{gigs} gigabytes a month. What does {p.he} pay in {months} months?",
        f"Each month {p.name} pays ${base} for {p.his} phone and ${each} for each of the {gigs} "
        f"gigabytes {p.he} uses. How much is that for {months} months?",
    )
    data = gigs * each
    steps = (
        f"The {gigs} gigabytes cost {mul(gigs, each)} dollars a month.",
        f"One month costs {add(base, data)} dollars.",
        f"In {months} months {p.name} pays {mul(months, base + data)} dollars.",
    )
    return Story(question, steps, (base + data) * months)


@story
def fruit_sale(d: Draw) -> Story:
    p = d.person()
    fruit = d.pick(*FRUITS)
    bags, size, price = d.n(5, 30), d.n(3, 9), d.n(2, 9)
    loose = d.n(2, size - 1)
    total = bags * size + loose
    question = d.pick(
        f"{p.name} picks {total} {fruit}. {p.He} keeps {loose} of them and packs the rest into "
        f"bags of {size}. Each bag sells for ${price}. How much money does {p.he} make?",
        f"A bag of {size} {fruit} sells for ${price}. {p.name} has {total} {fruit}, eats {loose} "
        f"of them and sells the rest in bags. How many dollars does {p.he} earn?",
    )
    steps = (
        f"{p.name} has {sub(total, loose)} {fruit} to sell.",
        f"They fill {div(total - loose, size)} bags.",
        f"At {price} dollars a bag {p.he} makes {mul(bags, price)} dollars.",
    )
    return Story(question, steps, bags * price)


@story
def fundraiser(d: Draw) -> Story:
    goal = d.n(400, 900, 50)
    washed, price, gift = d.n(10, 30), d.n(5, 9), d.n(20, 99)
    made = washed * price
    group = d.pick("class", "team", "choir", "club")
    question = d.pick(
        f"A {group} wants to raise ${goal}. It washes {washed} cars for ${price} each and gets a "
        f"gift of ${gift}. How much more does the {group} need?",
        f"To raise ${goal}, a {group} washes {washed} cars at ${price} each. A neighbor adds "
        f"${gift}. How many dollars are still missing?",
    )
    steps = (
        f"Washing {washed} cars brings in {mul(washed, price)} dollars.",
        f"With the gift the {group} has {add(made, gift)} dollars.",
        f"The {group} still needs {sub(goal, made + gift)} dollars.",
    )
    return Story(question, steps, goal - made - gift)


@story
def rent(d: Draw) -> Story:
    p = d.person()
    thing = d.pick("boat", "bike", "car", "canoe", "scooter")
    flat, hourly, hours, people = d.n(10, 30), d.n(4, 9), d.n(2, 9), d.n(2, 6)
    flat += -(flat + hourly * hours) % people
    cost = flat + hourly * hours
    question = d.pick(
        f"Renting a {thing} costs ${flat} plus ${hourly} an hour. {people} friends rent it for "
        f"{hours} hours and share the cost. How much does each of them pay?",
        f"{p.name} and {p.his} friends, {people} people in all, rent a {thing} for {hours} hours. "
        f"The price is ${flat} plus ${hourly} an hour. What is each person's share?",
    )
    steps = (
        f"The {hours} hours cost {mul(hours, hourly)} dollars.",
        f"With the fixed price the {thing} costs {add(flat, hourly * hours)} dollars.",
        f"Each of the {people} people pays {div(cost, people)} dollars.",
    )
    return Story(question, steps, cost // people)


@story
def cents(d: Draw) -> Story:
    p = d.person()
    dimes, nickels, pennies = d.n(3, 20), d.n(3, 20), d.n(2, 40)
    question = d.pick(
        f"{p.name} finds {dimes} dimes, {nickels} nickels and {pennies} pennies in a jar. "
        f"How many cents is that?",
        f"In {p.his} pocket {p.name} has {pennies} pennies, {nickels} nickels and {dimes} dimes. "
        f"How many cents does {p.he} have?",
    )
    a, b = 10 * dimes, 5 * nickels
    steps = (
        f"The {dimes} dimes are worth {mul(dimes, 10)} cents.",
        f"The {nickels} nickels are worth {mul(nickels, 5)} cents.",
        f"With the pennies {p.name} has {add(a, b, pennies)} cents.",
    )
    return Story(question, steps, a + b + pennies)


@story
def cheaper_shop(d: Draw) -> Story:
    p = d.person()
    thing = d.pick("bricks", "tiles", "bulbs", "candles", "towels")
    count, low, more = d.n(6, 60), d.n(2, 6), d.n(2, 3)
    high = low + more
    question = d.pick(
        f"{p.name} needs {count} {thing}. One shop sells them for ${high} each, another for "
        f"${low} each. How much does {p.he} save at the cheaper shop?",
        f"{thing.capitalize()} cost ${high} each in one shop and ${low} each in another. How many "
        f"dollars does {p.name} save by buying {count} {thing} where they are cheaper?",
    )
    steps = (
        f"In the first shop the {thing} cost {mul(count, high)} dollars.",
        f"In the second shop they cost {mul(count, low)} dollars.",
        f"{p.name} saves {sub(count * high, count * low)} dollars.",
    )
    return Story(question, steps, count * more)


@story
def allowance(d: Draw) -> Story:
    p = d.person()
    weekly, weeks, walks, fee = d.n(5, 15), d.n(3, 9), d.n(4, 20), d.n(3, 8)
    spent = d.n(5, weekly * weeks)
    a, b = weekly * weeks, walks * fee
    question = d.pick(
        f"{p.name} gets ${weekly} a week from {p.his} parents and ${fee} for every dog {p.he} "
        f"walks. In {weeks} weeks {p.he} walks {walks} dogs and spends ${spent}. How much money "
        f"does {p.he} have then?",
        f"For {weeks} weeks {p.name} is given ${weekly} a week. {p.He} also walks {walks} dogs for "
        f"${fee} each and spends ${spent}. How many dollars are left?",
    )
    steps = (
        f"In {weeks} weeks {p.name} gets {mul(weeks, weekly)} dollars.",
        f"Walking {walks} dogs pays {mul(walks, fee)} dollars.",
        f"That makes {add(a, b)} dollars.",
        f"After spending {spent} dollars {p.he} has {sub(a + b, spent)} dollars.",
    )
    return Story(question, steps, a + b - spent)
