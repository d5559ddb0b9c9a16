"""Common function words of about 50 languages, for Gopher's rule that a text has two of them.

English is the paper's list (Rae et al. 2021, A.1). The others are ours: eight to some twenty words
that nearly every paragraph of prose has two of, more where endings make each rarer. They are
compared as they stand, in lower case, as the paper's are. Languages without spaces have theirs
looked for inside the text.
"""

from __future__ import annotations

import functools

import numpy as np

from qwen2.corpus.filters.words import Hashes, split

SPACED = {
    "en": "the be to of and that have with",
    "ar": "في من على إلى أن التي هذا مع عن لا ما هو",
    "bg": "на и за от се да не са по това",
    "bn": "ও এবং এই একটি থেকে করে না তার জন্য যে হয় নিয়ে তিনি এক সঙ্গে কোনো",
    "ca": "de la el que i en per els amb una les del",
    "ceb": "ang sa ug nga mga si ni iyang usa dili kay mao alang niya kini",
    "cs": "a se na je v že to pro s jako z do které",
    "da": "og i at er det til en af på for med ikke der",
    "de": "der die und das in den von zu mit ist nicht ein sich auf für",
    "el": "και το να η του της με που για από σε είναι τα την τον θα στο αν ή ένα μια δεν",
    "eo": "la de kaj en al estas ne kiu por ke el kun sed pli aŭ oni",
    "es": "de la que el en y los las por con una para se del",
    "et": "ja on ei et see oli või kui mis ka oma ning aga selle mida siis saab kas kuid",
    "eu": "eta edo bat du da dira ez ditu hau den gisa ere duen beste baten baina",
    "fa": "و در به از که این را با است برای",
    "fi": "ja on ei että se oli tai ovat kun mutta myös joka jos voit voi kuin sen tämä ne jonka",
    "fr": "de la le et les des en un une que dans pour est du",
    "gl": "de a o que e en un unha para do da os as por non se é",
    "gu": "છે માટે અને પર કે આ તે એ તો જે નથી સાથે જો અથવા એક છો",
    "he": "של את על לא זה עם הוא או גם כי אם",
    "hi": "के में की है और से को का यह पर हैं",
    "hr": "i je u na se za da su od s koji kao ako ili ne što to bi kako",
    "hu": "a az és hogy nem is egy meg ez vagy van",
    "id": "yang dan di untuk dengan dari ini pada tidak dalam ke atau",
    "it": "di che e la il per un una in è del con non le",
    "ko": "이 그 수 있는 및 있다 있습니다 또는 이러한 하는 위해 대한 것은 때 할 그리고 다른 합니다",
    "lt": "ir yra į iš kad tai su ar kaip bet o jos jo nuo po buvo",
    "lv": "un ir lai vai ja ar uz to kā no tas arī ka kas par pēc bet",
    "mr": "आणि आहे किंवा ते हे नाही करा आहेत असे जे या एक होते काही",
    "ms": "yang dan di untuk dengan dari ini pada tidak dalam ke atau",
    "nb": "og i at er det til en av på for med ikke som",
    "nl": "de het een van en in is dat op te voor met niet zijn",
    "no": "og i at er det til en av på for med ikke som",
    "pl": "i w na się z do nie to jest że o jak od dla",
    "pt": "de a que o e do da em um para com uma os não",
    "ro": "de și în a la cu pe care nu un din pentru este să o mai sau se ca sunt",
    "ru": "и в на не что с по для это из как или от",
    "sk": "a sa na je v že to pre s ako z do ktoré",
    "sl": "in je v na se za da so z ki ne",
    "sr": "и је у на се за да су од који као i je u na se za da su od koji kao",
    "sv": "och i att det som en på är av för med den till inte",
    "sw": "na ya wa kwa ni katika za la kama hii",
    "ta": "ஒரு மற்றும் இந்த அல்லது உள்ள என்று அது இது பல சில என அவர் ஆனால் போது",
    "te": "మరియు ఒక ఈ లేదా నుండి అది ఇది కూడా ఆ కొన్ని చాలా అని ద్వారా ఏ",
    "tl": "ang ng sa na mga at ay para hindi ito",
    "tr": "ve bir bu için da de ile olarak olan en çok daha gibi veya her ancak sonra ne o",
    "uk": "і в на що не з до та для це як у або",
    "ur": "کے میں کی ہے اور سے کو کا یہ پر ہیں",
    "vi": "và của là có các được cho trong một không với để này người khi từ nếu hoặc đã sẽ vào",
}
UNSPACED = {
    "ja": "の に は を た が で と て も する です ます",
    "km": "និង នៃ ក្នុង ជា បាន ដែល មាន នេះ",
    "lo": "ແລະ ຂອງ ໃນ ທີ່ ເປັນ ມີ ໄດ້ ບໍ່",
    "my": "သည် ကို များ နှင့် တွင် မှ ၏ က",
    "th": "ที่ และ ของ ใน เป็น มี การ ได้ ให้ ไม่ จะ",
    "zh": "的 一 是 不 了 在 有 和 我 这 為 为 与 及 可 以",
}


@functools.cache
def hashes() -> tuple[Hashes, dict[str, frozenset[int]]]:
    """All listed words' hashes, sorted; and for each language the places of its own among them."""
    lists = {language: words.split() for language, words in SPACED.items()}
    every = sorted({word for words in lists.values() for word in words})
    cut = split(every)
    assert (cut.counts == 1).all(), "a stop word is one word"
    order = np.argsort(cut.hashes)
    place = {every[index]: rank for rank, index in enumerate(order.tolist())}
    return cut.hashes[order], {
        language: frozenset(place[word] for word in words) for language, words in lists.items()
    }


@functools.cache
def inside(language: str) -> tuple[str, ...]:
    """The words to look for inside a text of a language without spaces."""
    return tuple(UNSPACED[language].split())
