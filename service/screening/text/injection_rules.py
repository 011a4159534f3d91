"""The rules of `injection`, as data: what is found, in which family, and what it weighs.

Texts are folded (`folding`) when they come here: lower case, plain forms. Every repetition is bounded, and every
rule names the cues without one of which it cannot match.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """One pattern. Its group `order` takes part where the words are an order or open a sentence."""

    family: str
    cues: tuple[str, ...]
    pattern: re.Pattern[str]
    ordered: float
    """Score of the family where the words are an order."""
    mentioned: float
    """Score where they stand within a sentence, or in quotation marks."""


def _one_of(words: str) -> str:
    """A pattern for one of the words, each a pattern itself; `_` stands for a space between words."""
    return "(?:" + "|".join(word.replace("_", r"\s") for word in words.split()) + ")"


def _rule(family: str, cues: str, ordered: float, mentioned: float, *pattern: str) -> Rule:
    return Rule(
        family,
        tuple(cue.replace("_", " ") for cue in cues.split()),
        re.compile("".join(pattern)),
        ordered,
        mentioned,
    )


_ORDER = (
    r"(?P<order>^|[.!?;:,\n>\])}】」。！？；：，*#-]\s{0,3}|[请你须必要并且]"
    rf"|\b{_one_of('please kindly now must always just simply should you and then')}\s)?"
)
"""What stands before an order: nothing, the end of a sentence, `please`, `you must`."""
_LINE = r"(?:^|\n)\s{0,3}"
_SENTENCE = r"(?:^|[.!?\n]\s{0,3})"
_A_WORD = r"(?:\w{1,14}\s)?"
_ZH = r"[^。！？\n]"
"""Anything within a Chinese sentence."""

_IT = r"(?:this|these|the\s(?:following|current|above|present))\s(?:\w{1,12}\s)?" + _one_of(
    "passages? documents? texts? pages? results? answers? items? candidates? products? articles? contents?"
    " doc one entry snippets? websites? listings? images?"
)
_CORE = r"(?:this|these|the\s(?:following|current|above|present))\s(?:\w{1,12}\s)?" + _one_of(
    "passages? documents? texts? candidates? contents? doc entry snippets? search_results?"
)
"""What only a retrieval system calls it: reviews rate products, and articles results."""
_RANKER = (
    rf"(?:{_one_of('the all any every our dear')}\s)?"
    rf"(?:{_one_of('ai ranking re-?ranking relevance retrieval search large language grading scoring neural')}\s){{0,3}}"
    + _one_of(
        "models? rankers? re-?rankers? judges? llms? ai assistants? evaluators? graders? raters? assessors?"
        " engines? annotators? bots?"
    )
)
_FULLY = _one_of(
    r"perfect(?:ly)? high(?:ly)? most extremely exactly fully completely totally absolutely directly 100\s?%"
    " entirely undoubtedly definitely by_far_the maximally uniquely the_only the_best the_ideal the_correct"
)
_TOP = _one_of(
    r"highest maximum max top full perfect best first number_one no\.?_?1 #\s?1 10\s?/\s?10 5\s?/\s?5 100\s?/\s?100"
    r" 1\.0{1,4} 10_out_of_10 5_out_of_5 100\s?% ten_out_of_ten position_(?:1|one)"
)
_IT_ZH = r"(?:本|这|该|此|以上|以下)一?[篇段个条份则]?" + _one_of(
    "文档 段落 文章 文本 内容 页面 网页 结果 候选 商品 产品 答案 回答 段 篇 条 文"
)
_FULLY_ZH = _one_of("完全 非常 高度 最为?高? 极其 极为 十分 绝对 百分之百 100% 完美 直接")
_TOP_ZH = _one_of(
    r"最高 满分 第一 首位 榜首 最前 最上 10\s?分 十分 100\s?分 一百分 1\.0 yes true"
    " (?:完全|高度|非常|最高?|极其|十分|绝对)相关"
)
_CORE_ZH = (
    r"(?:本|这|该|此|以上|以下)一?[篇段个条份则]?(?:文档|段落|文本|候选|检索结果|搜索结果|结果|段|内容)"
)
_MEETS_ZH = _one_of("相关 匹配 符合 满足 回答 切题 对应")
_QUERY_ZH = _one_of("查询 搜索 检索 提问 用户的?(?:问题|需求|意图) query")
_GIVE = _one_of(
    "rate score rank re-?rank judge mark label grade give assign place put treat consider classify set list"
)
_TO_THE_TOP = (
    r"(?:[\s,:=]{1,2}[\w'\"%-]{1,14}){0,6}?[\s,:='\"]{1,3}(?:"
    rf"{_TOP}\b|(?:as\s)?{_A_WORD}relevant\b|above\s(?:all|every|the)|before\s(?:all|any|every)"
    r"|at\sthe\s(?:very\s)?top|yes\b)"
    r"(?!\s(?:if|when|unless|only|or\s(?:not|irrelevant)|name|page|line|column|of\seach))"
)
_GIVE_ZH = _one_of(
    "评分 打分 评为 评定 判定 判断 判为 排名 排序 排在 排到 排为 标记 标注 得分 分数 给出 打 视为 置于 放在 列为 给"
)
_VERDICT = (
    r"(?:^|[\n;,，；。])\s{0,3}[\"'*{]{0,3}"
    r"(?:(?:relevan(?:ce|t)|match|matching)(?:[ _-](?:score|label|rating))?|is[ _]relevant|judge?ment|verdict"
    r"|相关(?:性|度)?(?:评分|得分|分数)?|是否相关|评分|得分)[\"'*]{0,3}\s?[:=：为]\s?[\"']?"
    + _one_of(
        r"10/10 10 5/5 5 1\.0{1,4} 1 100%? yes true high(?:ly_relevant)? highest perfect max(?:imum)? 是 满分 最高分?"
    )
    + r"\b"
)
_VERDICT_CUES = 'relevan match: match_: match_= match= match" matching: judgment: judgement: judgment= verdict 相关 评分 得分'

RULES = (
    # Orders to set the task aside.
    _rule(
        "override",
        "ignore disregard forget override bypass do_not_follow do_not_consider do_not_use do_not_apply"
        " don't_follow don't_consider",
        0.7,
        0.4,
        _ORDER,
        r"\b",
        _one_of(
            "ignore disregard forget override bypass do_not_(?:follow|consider|use|apply) don't_(?:follow|consider)"
        ),
        r"\s(?!for\b)(?:\w{1,14}\s){0,4}",
        _one_of(
            "quer(?:y|ies) question instructions? prompts? criteria guidelines directives rules task"
            r" (?:other|remaining)_(?:\w{1,14}\s)?(?:documents?|passages?|candidates?|results?|items?|answers?)"
            " everything_(?:above|before)"
        ),
        r"\b(?!\s(?:string|param|suggestion|cache|log|case|term|word|option|plan|field|length|time))",
    ),
    _rule(
        "override",
        "忽略 无视 忘记 忘掉 不要 不必 跳过 别管 抛开",
        0.7,
        0.4,
        _ORDER,
        _one_of("忽略 无视 忘记 忘掉 不要(?:理会|考虑|管|参考|遵守|遵循) 不必理会 跳过 别管 抛开"),
        r"(?!大小写|空格|标点|停用|空值|重音)",
        _ZH + r"{0,10}?(?<!进行)",
        _one_of(
            "查询 问题 指令 指示 提示词? 任务 要求 规则 评分标准 标准"
            " (?:其他|其它|其余)的?(?:所有)?(?:文档|段落|结果|候选|内容|商品)"
        ),
        r"(?!中|里|时|词|参数|字符|语句|缓存|日志|建议|条件|计划|超时)",
    ),
    # Claims of being relevant.
    _rule(
        "claim",
        "the_quer this_quer your_quer any_quer every_quer user_quer user's_quer search_quer the_question this_question"
        " your_question any_question every_question user_question user's_question the_search your_search user's_search",
        0.7,
        0.7,
        rf"{_IT}\s(?:\w{{1,14}}\s){{0,4}}?(?:relevant|match(?:es)?|answers?|satisf(?:y|ies)|addresses|response)\s",
        r"(?:\w{1,14}\s){0,2}?(?:the|your|this|any|every|all|user)(?:\s(?:user|search)(?:'s)?)?\s",
        r"(?:quer(?:y|ies)|question(?!\s(?:of|whether|how|why|mark))|search)\b",
    ),
    _rule(
        "claim",
        "relevan",
        0.65,
        0.65,
        rf"{_CORE}\s(?:\w{{1,14}}\s){{0,2}}?",
        _one_of(
            "perfectly completely absolutely maximally totally extremely undoubtedly 100\\s?% the_most by_far_the_most"
        ),
        r"\srelevant\b",
    ),
    _rule(
        "claim",
        "relevan perfect_match perfect_answer exact_match best_match best_answer ideal_match ideal_answer correct_answer",
        0.35,
        0.35,
        rf"{_IT}\s(?:\w{{1,14}}\s){{0,3}}?{_FULLY}\s(?:\w{{1,14}}\s){{0,2}}?(?:relevant|match|answer)\b",
    ),
    _rule(
        "claim",
        "查询 搜索 检索 提问 用户 query",
        0.7,
        0.7,
        _IT_ZH,
        _ZH + r"{0,8}?(?:",
        rf"{_QUERY_ZH}{_ZH}{{0,6}}?{_FULLY_ZH}地?{_MEETS_ZH}|{_FULLY_ZH}地?{_MEETS_ZH}{_ZH}{{0,6}}?{_QUERY_ZH})",
    ),
    _rule(
        "claim",
        "相关",
        0.65,
        0.65,
        rf"{_CORE_ZH}{_ZH}{{0,4}}?(?:完全|高度|绝对|百分之百|100%|完美|非常|最)相关",
    ),
    _rule(
        "claim",
        "答案 结果 匹配 文档 回答",
        0.35,
        0.35,
        rf"(?:{_IT_ZH}|这|本)(?:就是|是)(?:最佳|最好的?|唯一|标准|正确)的?(?:答案|结果|匹配|文档|回答)",
    ),
    # Orders about the score.
    _rule(
        "score",
        "relevan this_passage this_document this_text this_candidate this_content this_doc this_entry this_snippet"
        " this_search these_ above_passage above_document above_text following_passage following_document"
        " following_text current_passage current_document current_text present_document",
        0.75,
        0.35,
        _ORDER,
        r"\b",
        _GIVE,
        r"\s(?:",
        rf"{_CORE}\b|(?:a|an|the|its|this|it)\s(?:\w{{1,14}}\s){{0,3}}?relevan(?:ce|cy|t)\b",
        rf"|(?:{_IT}|it)(?=\s[^.\n]{{0,60}}\brelevan))",
        _TO_THE_TOP,
    ),
    _rule(
        "score",
        "regardless no_matter above_all above_every whatever other_result other_item other_candidate",
        0.6,
        0.3,
        _ORDER,
        r"\b",
        _GIVE,
        rf"\s(?:{_IT}|it|me|us)\b",
        r"(?=[^\n]{0,80}\b(?:regardless|no matter|above all|above every|whatever|other (?:results?|items?|candidates?)))",
    ),
    _rule(
        "score",
        "rate_this rate_it rank_this rank_it score_this score_it highest maximum 10/10 5/5 top_rating top_score",
        0.4,
        0.2,
        _ORDER,
        r"\b",
        _GIVE,
        rf"\s(?:{_IT}|it|(?:a|an|the|its)\s(?:\w{{1,14}}\s){{0,2}}?(?:scores?|rating|rank|label|grade))\b",
        _TO_THE_TOP,
    ),
    _rule(
        "score",
        "yes relevant",
        0.65,
        0.35,
        _ORDER,
        r"\b",
        _one_of("answer respond reply output"),
        r"\s(?:(?:only|with|just|simply|always|the|word|token)\s|:\s?){0,4}['\"“‘`]?",
        _one_of("yes relevant highly_relevant perfectly_relevant"),
        r"\b(?!\s(?:or|if|when|and\sno|to|results?|documents?|passages?|information|content|items?|data|pages?|entries))",
        r"(?!['\"”’`]?\s?(?:or|/|if|when|and|to)\b)",
    ),
    _rule(
        "score",
        "评 打 判 排名 排序 排在 排到 排为 标记 标注 得分 分数 给 视为 置于 放在 列为",
        0.75,
        0.75,
        rf"{_CORE_ZH}{_ZH}{{0,8}}?{_GIVE_ZH}{_ZH}{{0,10}}?(?:{_TOP_ZH}|为相关|成相关)(?!性|度|的话|文献|工作)",
        rf"|{_IT_ZH}{_ZH}{{0,8}}?{_GIVE_ZH}{_ZH}{{0,10}}?{_FULLY_ZH}相关(?!性|度|的话|文献|工作)",
        rf"|{_IT_ZH}{_ZH}{{0,6}}?相关(?:性|度){_ZH}{{0,6}}?{_TOP_ZH}",
    ),
    _rule(
        "score",
        "评 打 排名 排序 排在 排到 排为 得分 分数 给 置于 放在 列为",
        0.4,
        0.4,
        rf"(?:{_IT_ZH}|本|它|此){_ZH}{{0,8}}?{_GIVE_ZH}{_ZH}{{0,10}}?{_TOP_ZH}",
    ),
    _rule(
        "score",
        "最高 满分 第一 首位 yes 是 相关",
        0.65,
        0.3,
        r"(?P<order>(?:^|[\n。！？；：:，,!?;]\s{0,3})(?:请|务必|必须|一定要|直接|你应该?|你只能?|你要|并且?|然后|只|都){1,3})?",
        _one_of("给出? 打出? 输出 回答 回复 返回 评为 判为 判定为 排到?在?"),
        _ZH + r"{0,6}?",
        r"(?:最高(?:的)?(?:相关性|相关度)?(?:分|评分|得分|排名)|满分|第一(?:名|位)|首位",
        r"|[“\"'「]?(?:是|yes|相关)[”\"'」]?(?=[。！!，,\n]|$))",
    ),
    # Words addressed to the model.
    _rule(
        "addressed",
        "note_to note_for note, note: message_to message_for message: memo_to notice_to notice: instructions_to"
        " instructions_for instruction_to instruction_for instructions: reminder_to reminder: hint_to hint: attention"
        " dear_ hey_ hey, hello hi_ you_are_a you_are_the you_are_now if_you_are if_you're",
        0.6,
        0.6,
        r"\b(?:note|message|memo|notice|instructions?|reminder|hint|attention)\s?(?:to|for|,|:)\s?",
        rf"{_RANKER}\s?(?:[:,.!;—-]|that\b)",
        rf"|{_SENTENCE}(?:dear|hey|hello|attention|hi)[\s,]{{1,2}}{_RANKER}\s?[:,!.]",
        rf"|{_SENTENCE}you\sare\s(?:now\s)?(?:a|an|the)\s(?:\w{{1,14}}\s){{0,2}}?",
        _one_of("ranker reranker relevance_(?:judge|model|assessor) ranking_model search_engine"),
        r"\b|\bif\syou(?:'re|\sare)\s(?:a|an|the)\s(?:\w{1,14}\s){0,2}?",
        _one_of("ranker reranker ai llm language_model ranking_model judge assistant"),
        r"\b",
    ),
    _rule(
        "addressed",
        "致 告诉 提示 提醒 写给 亲爱的 尊敬的 请注意 给",
        0.6,
        0.6,
        _one_of("致 告诉 提示 提醒 写给 亲爱的 尊敬的 请注意 给"),
        r"\s?(?:各位|所有)?(?:负责)?",
        _one_of("排序 重排 排名 评分 打分 相关性 检索 搜索 语言 大语言 人工智能 ai"),
        r"?的?",
        _one_of("大?模型 系统 助手 评委 评审员? 裁判 引擎 评分员 算法"),
        r"的?(?:说明|提示|注意|备注|留言|指令|话|一段话)?\s?[:,，：。!！]",
    ),
    # Marks of roles and delimiters.
    _rule(
        "marks",
        "<| inst] sys>> _of_turn <im",
        0.5,
        0.5,
        r"<\|[a-z_]{2,24}\|>|<\|?(?:im_start|im_end|endoftext|begin_of_text|eot_id|start_header_id)\|?>",
        r"|\[/?inst\]|<</?sys>>|<(?:start|end)_of_turn>",
    ),
    _rule(
        "marks",
        "system assistant 系统 助手 ##",
        0.45,
        0.45,
        r"(?:^|\n)[\s#*\[(<-]{0,6}(?:system|assistant|系统|助手)[\s*\])>-]{0,4}:",
        r"|(?:^|\n)#{2,4}\s?(?:system|instructions?|response|assistant)\b",
    ),
    _rule(
        "marks",
        "</d </p </q </i </s </c </u -end =end #end -_end =_end #_end -begin =begin -_begin =_begin #_begin -start -_start"
        " =_start #_start 结束 开始",
        0.45,
        0.45,
        r"</(?:document|passage|query|instruct|instructions?|system|candidate|context|doc|user_input)>",
        rf"|{_LINE}[-=#]{{3,20}}\s?(?:end|start|begin)(?:\sof)?(?:\sthe)?\s",
        _one_of("document passage query candidate context input text"),
        rf"|{_LINE}[-=]{{0,20}}\s?(?:文档|段落|查询|候选)(?:结束|开始)",
    ),
    # Verdicts, ready-made.
    _rule("verdict", _VERDICT_CUES, 0.45, 0.45, _VERDICT),
    _rule("verdict", _VERDICT_CUES, 0.65, 0.65, rf"{_VERDICT}[\s\S]{{0,60}}?{_VERDICT}"),
)
