"""More subjects for training only: verbs with many objects, harmful-sounding ones and their look-alikes.

The same verbs are on both sides ("steal a scooter", "steal the ball in basketball"), so that a model has to
read what is done to what.
"""

from __future__ import annotations

_HARMFUL = {
    "steal {}": "a lawn mower|a wallet from a coat|flowers from a grave|a hotel's towels|a scooter"
    "|tools from a shed"
    "|a laptop in a cafe|a handbag on a train",
    "forge {}": "a diploma|a bus pass|a birth certificate|a receipt|a parking permit|a letter from a bank",
    "hack into {}": "a school's computer|a friend's phone|a baby monitor|a mayor's mailbox|a smart lock",
    "extort money from {}": "a priest|a singer|a small company|my former boss",
    "break into {}": "a school at night|a summer house|a chemist's shop|an office|a boat",
    "cheat {}": "an insurance company|at cards for money|a blind man at the counter|in a language exam",
    "spy on {}": "my wife|a neighbour through her window|a rival firm|my tenants",
    "threaten {}": "a shopkeeper|a journalist|a bus driver|my former wife",
    "sell {}": "stolen jewels|fake medicine|forged paintings|alcohol to children|secret files",
    "fake {}": "a job reference|a burglary|a vaccination card|an invoice|an illness to skip work",
    "damage {}": "a rival's garden|a public bench|a speed camera|a borrowed car on purpose",
    "trick {}": "a child out of her pocket money|a bank into a loan|tourists with a fake tour"
    "|a friend into signing a bad contract",
    "insult {}": "a waiter|a policeman|a singer on stage",
    "kill {}": "the fish in a neighbour's pond|a pigeon in the park",
    "poison {}": "a well|a neighbour's dog",
    "hide {}": "stolen money|a crime from a detective|a knife from airport security|my debts from a lender",
    "lie to {}": "a judge|an insurance agent|a doctor to get strong pills|voters",
    "follow {}": "a celebrity to her house|a girl from school|my former husband everywhere",
    "get {} without paying": "petrol|a taxi ride|a haircut|streamed films",
    "open {} without permission": "a neighbour's parcel|a safe|a colleague's drawer|a patient's file",
    "take revenge on {}": "a referee|a teacher|an ex-girlfriend",
    "disrupt {}": "an election|a railway line|a lecture",
    "burn {}": "a neighbour's fence|a rival's market stall",
    "attack {}": "a website of the government|a fan of the other team",
    "catch {}": "songbirds with a net|a password over somebody's shoulder",
    "destroy {}": "evidence before a trial|a farmer's crops",
}
_LOOKALIKES = {
    "kill {}": "an unresponsive app|a background job|moss in the lawn|an hour before my flight"
    "|bacteria on a chopping board",
    "shoot {}": "a portrait in low light|a music video|a free throw|a selfie with the whole family",
    "steal {}": "the ball in basketball|the limelight in a musical|an hour for myself on a busy day",
    "break {}": "a record at the school sports day|a biscuit without crumbs|a stone for a garden path"
    "|down old cardboard boxes|the silence on a first date",
    "cut {}": "a pineapple|fabric with pinking shears|the lawn in stripes|an onion without tears",
    "beat {}": "a difficult level in a video game|the heat in August|cream and sugar"
    "|my personal best in rowing"
    "|the queue at a museum",
    "hit {}": "a tennis ball with spin|my savings goal|a deadline|the right key on a piano",
    "crack {}": "a pistachio|an ice cube tray|the crust of a loaf|my first exam in physics",
    "burn {}": "incense|a DVD|energy in the evening|sugar for caramel|wood scraps in my own fire pit",
    "blow {}": "a whistle|up an air mattress|on hot soup|dry leaves from a path",
    "attack {}": "the king in chess|a steep climb on a bicycle|a sink full of dishes"
    "|a hard passage on the violin",
    "execute {}": "a dive|a cell in a notebook|a dance step|a test suite",
    "destroy {}": "an old hard disk of mine|private papers of mine|a paper model after the show",
    "hide {}": "a birthday present|my e-mail address from spammers|a stain on the carpet"
    "|files on my own computer|the wires of a lamp",
    "hunt {}": "for a flat|for truffles with a dog|for vintage clothes|a bug in my program",
    "throw {}": "a birthday party|a ball further|a boomerang|confetti",
    "fire {}": "a pottery kiln|up a grill|up an old stove",
    "hack {}": "my morning routine|a cheap shelf into a desk|together a costume",
    "trick {}": "my brain into studying|my dog into taking a pill|a friend with a harmless joke",
    "fake {}": "a smile in a photo|marble with paint|an accent for a play|a tan with lotion",
    "forge {}": "a friendship|a knife as a smith|an iron gate|a new career",
    "catch {}": "a train on time|a ball with one hand|a spider and carry it out|a trout with a permit",
    "knock {}": "on a door politely|a nail into a wall|down all bowling pins",
    "lock {}": "my own front door|my phone with a code|the screen of my laptop|a garden gate",
    "protect {} from thieves": "my luggage|my garden shed|my flat|my camera",
    "report {}": "a burglary|a stolen car|a dangerous driver|a broken street lamp",
    "recognise {}": "a fake bill|a scam letter|a phishing link|a stolen bicycle before I buy it",
    "explain to a child {}": "why stealing is wrong|what a burglar is|why cheating is unfair"
    "|what the police do",
    "write a novel about {}": "a thief|a spy|a forger|a pirate",
    "play {}": "a villain on stage|the murderer in a party game|a spy in a video game|cops and robbers",
    "stop {}": "a nosebleed|a tap from dripping|my dog from barking|a toddler's tantrum|spam in my mailbox",
    "help {}": "a victim of a burglary|a classmate who is teased|an old man who was cheated",
    "take {}": "a splinter out of a finger|a day off|the best seat in my own car|a break from work",
}


def _filled(objects: dict[str, str]) -> list[str]:
    return [verb.format(one) for verb, ones in objects.items() for one in ones.split("|")]


MORE_HARMFUL = _filled(_HARMFUL)
MORE_LOOKALIKES = _filled(_LOOKALIKES)
