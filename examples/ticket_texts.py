"""Customer messages with known labels, composed from clauses: the text that the built-in model learns from.

A message is a topic clause, plus at most one clause each of mood and urgency, in varying order, among greetings,
context, small talk and a closing, with fillers and now and then a typo. The labels are what the composition says.
A tenth of all combinations of clauses is held out: `tickets(held_out=True)` draws only from it, training never does.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

TOPICS = {
    "billing": [
        "I was {charged} {amount} on {date} although my plan costs less",
        "my {card} was {charged} twice for order {order}",
        "the invoice for {month} shows {amount} that I cannot explain",
        "there is {an_extra} on my last {bill}",
        "the tax number on my {bill} is {wrong}",
        "I need a copy of the {bill} for {month}",
        "why did the price of my {plan} plan go up to {amount}",
        "the discount code was not taken off my {bill}",
        "my payment with {card} keeps being declined although there is money on it",
    ],
    "delivery": [
        "my {product} has not arrived, it should have been here on {date}",
        "the {courier} says that parcel {order} was delivered but nobody got it",
        "where is order {order}, the tracking page has not moved since {date}",
        "the parcel with the {product} came to the wrong address in {city}",
        "the {courier} left the box with my {product} in the rain",
        "when will the {product} be shipped to {city}",
        "only half of order {order} was in the parcel",
        "can you send order {order} to my office in {city} instead",
    ],
    "login": [
        "I cannot {log_in} to my account since {date}",
        "the password reset mail never {arrives}",
        "my account is locked after {number} attempts",
        "the code by text message never {arrives} so I can't {log_in}",
        "it says that my user name {name} does not exist when I {log_in}",
        "I lost the phone with my two-factor app and can't {log_in}",
        "after I changed my e-mail address I can no longer {log_in}",
        "my {device} keeps asking for the password again and again",
    ],
    "refund": [
        "I sent the {product} back on {date} and want my money back",
        "please refund order {order}, {amount} in all",
        "I returned the {product} and the refund of {amount} is not on my {card} yet",
        "I would like to return the {product} and get {amount} back",
        "how long does it take until the money for the returned {product} is paid back",
        "the {product} was broken when I opened it and I ask for my money back",
        "you promised to pay back {amount} for order {order}",
        "the refund for order {order} was {amount} short",
    ],
    "bug": [
        "the app {crashes} when I open the {screen} on my {device}",
        "since version {version} the {screen} stays blank",
        "the {screen} shows an error with code {number} on my {device}",
        "the export of the {screen} {crashes} at {number} percent",
        "the {button} button on the {screen} does nothing on my {device}",
        "since the update the app {crashes} on every start",
        "the numbers on the {screen} are added up {wrong}ly",
        "dark mode makes the text on the {screen} unreadable on my {device}",
    ],
    "feature_request": [
        "could you add {feature} to the {screen}",
        "it would be useful to have {feature}",
        "is there a plan to support {feature} on {device}",
        "I suggest that the {screen} gets {feature}",
        "{feature} is the one thing that I miss in the app",
        "our team wishes for {feature} in the next version",
        "have you thought about {feature} for the {screen}",
        "other apps offer {feature}, yours should too",
    ],
    "cancellation": [
        "please cancel my {plan} plan at the end of {month}",
        "I want to close my account and stop the {plan} subscription",
        "how do I end my subscription before {date}",
        "I don't want the {plan} plan to renew in {month}",
        "we are moving to another provider, so end our {plan} contract on {date}",
        "I asked you to stop my membership and it still runs",
        "please delete my account {name} and end the subscription",
        "cancel order {order} before it is packed, I no longer need the {product}",
    ],
    "product_question": [
        "does the {product} work with my {device}",
        "what is the difference between the {plan} plan and the next larger one",
        "how many people can use one {plan} plan",
        "is the {product} in stock in {color}",
        "how long is the warranty of the {product}",
        "which size of the {product} fits a person of {number} centimetres",
        "can the {product} be used outdoors in {city} in winter",
        "is there a manual for the {product} in another language",
    ],
}
MOODS = {
    "positive": [
        "I really love your {thing}", "thanks so much for the great {thing}", "your {thing} is fantastic",
        "you have been wonderful so far", "I am very happy with everything else", "keep up the excellent work",
        "your colleague {name} was so kind and helpful", "best {thing} I have ever used",
        "I recommend you to all my friends", "what a pleasure to be your customer", "brilliant {thing} by the way",
        "we are delighted with the {thing}", "you guys are amazing", "five stars from me",
    ],
    "negative": [
        "this is really annoying", "I am very disappointed in your {thing}", "what a terrible {thing}",
        "I am fed up with this", "this is the worst {thing} I have ever seen", "that is simply unacceptable",
        "I am losing my patience", "your {thing} is a joke", "I have never been treated so badly",
        "nobody seems to care over there", "I regret that I ever signed up", "honestly, this is ridiculous",
        "I am furious", "such a waste of my time",
    ],
    "neutral": [
        "", "", "", "this is my first message to you", "I am writing on behalf of {name}", "I use the {plan} plan",
        "I have been a customer since {month}", "for your information", "I could not find it in the help pages",
    ],
}  # fmt: skip
URGENCY = {
    True: [
        "I need an answer today", "this is urgent", "please hurry, I need it by {weekday}", "it can't wait",
        "please answer as soon as possible", "we are losing customers every hour", "help me right now please",
        "my deadline is tomorrow morning", "everything stands still here until this is solved",
        "please treat this with the highest priority", "I must have this solved within {few} hours",
        "call me back immediately", "time is running out for us",
    ],
    False: [
        "", "", "", "", "there is no hurry", "take your time", "whenever you find the time", "it is not urgent at all",
        "an answer next week is fine", "no rush", "just when you get to it", "it can wait",
    ],
}  # fmt: skip
GREETINGS = ["", "", "Hello,", "Hi there,", "Good morning,", "Dear support team,", "Hey,", "Hi {name},", "To whom it may concern,",
             "Good evening,", "👋 Hi,", "Grüß Gott,", "Hello again,"]  # fmt: skip
CONTEXT = ["", "", "", "", "I am writing from {city}.", "My customer number is {order}.", "I bought the {product} in {month}.",
           "I talked to {name} on {date}.", "We are a small company from {city}.", "I use a {device} at home.",
           "My name is {name} and I work in {city}.", "I have had the {plan} plan for {number} weeks."]  # fmt: skip
CLOSINGS = ["", "", "Thanks, {name}", "Best regards, {name}", "Regards", "Kind regards from {city}, {name}", "{name}", "Bye",
            "Yours sincerely, {name}", "Cheers", "– {name}", "Sent from my {device}"]  # fmt: skip
FILLERS = {
    "name": "Anna Ben Chloé Dmitri Elif Farid Grace Hiro Ines José Kofi Lena Mehmet Nora Oscar Priya Quinn Rosa Søren "
    "Tariq Uma Viktor Wen Ximena Yara Zoë Łukasz Aoife".split(),
    "city": "Leeds Porto Kraków Lyon Graz Ghent Turin Malmö Cork Basel Bilbao Tallinn Split Bergen Utrecht Nantes "
    "Osaka Toronto Nairobi Lima".split(),
    "product": ["coffee machine", "desk lamp", "running shoes", "rain jacket", "headphones", "keyboard", "office chair",
                "water filter", "backpack", "camera", "tent", "smart watch", "blender", "e-reader", "bike light",
                "air fryer", "speaker", "router", "yoga mat", "monitor"],
    "device": ["phone", "tablet", "laptop", "Android phone", "iPhone", "Windows PC", "Mac", "Linux machine", "smart TV"],
    "month": "January February March April May June July August September October November December".split(),
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "plan": ["basic", "family", "premium", "team", "student", "business", "starter", "pro"],
    "card": ["credit card", "debit card", "bank account", "Visa card", "Mastercard", "PayPal account"],
    "charged": ["charged", "billed", "debited"],
    "an_extra": ["an extra fee", "a strange position", "a second charge", "a service fee", "an unknown amount"],
    "bill": ["bill", "invoice", "receipt", "statement"],
    "wrong": ["wrong", "incorrect", "false"],
    "courier": ["courier", "driver", "postman", "delivery service", "carrier"],
    "log_in": ["log in", "sign in", "get in", "log on"],
    "arrives": ["arrives", "comes", "shows up", "reaches me"],
    "crashes": ["crashes", "freezes", "stops", "hangs", "closes itself"],
    "screen": ["calendar", "report page", "settings page", "dashboard", "map", "shopping list", "photo album", "search page",
               "timeline", "contact list"],
    "button": ["save", "send", "back", "share", "print", "upload"],
    "feature": ["a dark mode", "an offline mode", "a widget", "keyboard shortcuts", "export to spreadsheets", "a search field",
                "shared folders", "voice input", "reminders", "a weekly summary", "more colours", "sorting by date"],
    "thing": ["service", "shop", "support", "app", "team", "website", "company"],
    "color": ["blue", "red", "black", "green", "white", "grey", "yellow"],
    "few": ["two", "three", "four", "five", "six"],
}  # fmt: skip


@dataclass(frozen=True)
class Ticket:
    """A message and its labels."""

    text: str
    sentiment: str
    topic: str
    urgent: bool

    @property
    def answer(self) -> str:
        """The JSON line that the model is to answer with."""
        return json.dumps({"sentiment": self.sentiment, "topic": self.topic, "urgent": self.urgent})


def tickets(seed: int, held_out: bool) -> Iterator[Ticket]:
    """An endless stream of tickets from the combinations of clauses that are held out, or from the others."""
    rng = random.Random(seed)
    while True:
        topic, sentiment, urgent = rng.choice(list(TOPICS)), rng.choice(list(MOODS)), rng.random() < 0.5
        core, mood, urgency = rng.choice(TOPICS[topic]), rng.choice(MOODS[sentiment]), rng.choice(URGENCY[urgent])
        if (zlib.crc32(f"{core}|{mood}|{urgency}".encode()) % 10 == 0) is held_out:
            yield Ticket(_compose(rng, core, mood, urgency), sentiment, topic, urgent)


def _compose(rng: random.Random, core: str, mood: str, urgency: str) -> str:
    clauses = [core] + [clause for clause in (mood, urgency) if clause]
    if rng.random() < 0.6:
        rest = clauses[1:]
        rng.shuffle(rest)
        clauses = [core, *rest]
    else:
        rng.shuffle(clauses)
    asks = rng.random() < 0.5 and core.split()[0] in (
        "could",
        "does",
        "is",
        "how",
        "what",
        "where",
        "why",
        "can",
        "have",
        "which",
        "when",
    )
    sentences = [_sentence(rng, clause, "?" if clause is core and asks else None) for clause in clauses]
    if (context := rng.choice(CONTEXT)) and rng.random() < 0.8:
        sentences.insert(rng.randrange(len(sentences) + 1), context)
    if rng.random() < 0.15:
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(CONTEXT))
    separator = rng.choice([" ", " ", " ", "\n"])
    parts = [rng.choice(GREETINGS), separator.join(part for part in sentences if part), rng.choice(CLOSINGS)]
    text = _fill(rng, rng.choice([" ", "\n"]).join(part for part in parts if part))
    style = rng.random()
    if style < 0.08:
        return text.lower()
    if style < 0.11:
        return text.upper()
    return _with_typo(rng, text) if style < 0.35 else text


def _sentence(rng: random.Random, clause: str, end: str | None) -> str:
    end = end or rng.choice([".", ".", ".", "!", "...", ""])
    return clause[0].upper() + clause[1:] + (end or ",")


def _fill(rng: random.Random, text: str) -> str:
    values = {key: rng.choice(choices) for key, choices in FILLERS.items()}
    values |= {
        "order": f"{rng.choice('ABKXZ')}{rng.randrange(10_000, 999_999)}",
        "amount": f"{rng.choice('€$£')}{rng.randrange(3, 900)}.{rng.randrange(100):02d}",
        "date": f"{rng.randrange(1, 29)} {values['month']}",
        "number": str(rng.randrange(3, 200)),
        "version": f"{rng.randrange(1, 9)}.{rng.randrange(20)}",
    }
    return text.format_map(values)


def _with_typo(rng: random.Random, text: str) -> str:
    """Two neighbouring letters swapped, one dropped, or one doubled."""
    place = rng.randrange(len(text) - 1)
    kind = rng.randrange(3)
    if not text[place : place + 2].isalpha():
        return text
    middle = (text[place + 1] + text[place], text[place + 1], text[place] * 2 + text[place + 1])[kind]
    return text[:place] + middle + text[place + 2 :]
