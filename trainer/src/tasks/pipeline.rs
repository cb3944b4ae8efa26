//! Composed programs: a collection, conditions on its elements, a transformation, a result.
//!
//! Name, description and body are built from the same parts, so that what is asked is what is done. Whether a result
//! is computed by a loop or an expression depends on the parts alone: it is part of what a model learns.

use super::Function;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

/// Chance of any condition, and of a second one.
const CONDITION_SHARE: f64 = 0.75;
const SECOND_CONDITION_SHARE: f64 = 0.25;
/// Chance of a transformation.
const TRANSFORMATION_SHARE: f64 = 0.6;
/// Argument lists per task.
const CALLS: usize = 5;

/// What a program runs over.
struct Collection {
    noun: &'static str,
    kind: &'static str,
    arguments: &'static [&'static str],
    elements: &'static [&'static str],
    conditions: &'static [Condition],
    transformations: &'static [Transformation],
}

/// `{x}` is the element, `{k}` a constant. In phrases `{}` is the noun.
struct Condition {
    code: &'static str,
    name: &'static str,
    phrase: &'static str,
    constants: &'static [&'static str],
}

struct Transformation {
    code: &'static str,
    name: &'static str,
    phrase: &'static str,
    /// Whether results are numbers.
    numeric: bool,
}

const fn condition(code: &'static str, name: &'static str, phrase: &'static str) -> Condition {
    Condition { code, name, phrase, constants: &[] }
}

const fn with(
    code: &'static str,
    name: &'static str,
    phrase: &'static str,
    constants: &'static [&'static str],
) -> Condition {
    Condition { code, name, phrase, constants }
}

const fn transformation(code: &'static str, name: &'static str, phrase: &'static str, numeric: bool) -> Transformation {
    Transformation { code, name, phrase, numeric }
}

const SMALL: &[&str] = &["2", "3", "4", "5", "6", "7", "8", "9", "10", "12", "15", "20", "50", "100"];
const DIVISORS: &[&str] = &["3", "4", "5", "6", "7", "8", "9", "10"];
const LENGTHS: &[&str] = &["1", "2", "3", "4", "5", "6"];
const LETTERS: &[&str] = &["a", "b", "c", "d", "e", "i", "m", "n", "o", "r", "s", "t"];

const COLLECTIONS: [Collection; 3] = [
    Collection {
        noun: "numbers",
        kind: "list[int]",
        arguments: &["numbers", "values", "nums", "items", "data"],
        elements: &["x", "n", "number", "value"],
        conditions: &[
            condition("{x} % 2 == 0", "even_{}", "even {}"),
            condition("{x} % 2 == 1", "odd_{}", "odd {}"),
            condition("{x} > 0", "positive_{}", "positive {}"),
            condition("{x} < 0", "negative_{}", "negative {}"),
            condition("{x} != 0", "nonzero_{}", "nonzero {}"),
            with("{x} > {k}", "{}_above_{k}", "{} greater than {k}", SMALL),
            with("{x} < {k}", "{}_below_{k}", "{} less than {k}", SMALL),
            with("{x} >= {k}", "{}_at_least_{k}", "{} of at least {k}", SMALL),
            with("{x} % {k} == 0", "{}_divisible_by_{k}", "{} divisible by {k}", DIVISORS),
            with("{x} % {k} != 0", "{}_not_divisible_by_{k}", "{} not divisible by {k}", DIVISORS),
            with("{x} % 10 == {k}", "{}_ending_in_{k}", "{} whose last digit is {k}", &["1", "3", "5", "7", "9"]),
        ],
        transformations: &[
            transformation("{x} * {x}", "squares_of_{}", "squares of the {}", true),
            transformation("{x} ** 3", "cubes_of_{}", "cubes of the {}", true),
            transformation("2 * {x}", "doubles_of_{}", "doubles of the {}", true),
            transformation("{x} // 2", "halves_of_{}", "halves (rounded down) of the {}", true),
            transformation("abs({x})", "absolute_values_of_{}", "absolute values of the {}", true),
            transformation("-{x}", "negations_of_{}", "negations of the {}", true),
            transformation("{x} + 1", "successors_of_{}", "successors of the {}", true),
            transformation("{x} % 10", "last_digits_of_{}", "last digits of the {}", true),
            transformation("str({x})", "strings_of_{}", "string forms of the {}", false),
        ],
    },
    Collection {
        noun: "words",
        kind: "list[str]",
        arguments: &["words", "strings", "names", "items", "tokens"],
        elements: &["word", "w", "s", "item"],
        conditions: &[
            with("len({x}) > {k}", "{}_longer_than_{k}", "{} longer than {k}", LENGTHS),
            with("len({x}) < {k}", "{}_shorter_than_{k}", "{} shorter than {k}", &["3", "4", "5", "6"]),
            with("len({x}) == {k}", "{}_of_length_{k}", "{} of length {k}", LENGTHS),
            condition("len({x}) % 2 == 0", "{}_of_even_length", "{} of even length"),
            with("{x}.startswith('{k}')", "{}_starting_with_{k}", "{} that start with '{k}'", LETTERS),
            with("{x}.endswith('{k}')", "{}_ending_with_{k}", "{} that end with '{k}'", LETTERS),
            with("'{k}' in {x}", "{}_containing_{k}", "{} that contain '{k}'", LETTERS),
            with("'{k}' not in {x}", "{}_without_{k}", "{} that do not contain '{k}'", LETTERS),
            condition("{x}.isupper()", "uppercase_{}", "upper-case {}"),
            condition("{x}.islower()", "lowercase_{}", "lower-case {}"),
            condition("{x} == {x}[::-1]", "palindromic_{}", "{} that are palindromes"),
        ],
        transformations: &[
            transformation("len({x})", "lengths_of_{}", "lengths of the {}", true),
            transformation("{x}.upper()", "uppercase_forms_of_{}", "upper-case forms of the {}", false),
            transformation("{x}.lower()", "lowercase_forms_of_{}", "lower-case forms of the {}", false),
            transformation("{x}.capitalize()", "capitalized_{}", "capitalized forms of the {}", false),
            transformation("{x}[::-1]", "reversals_of_{}", "reversals of the {}", false),
            transformation("{x}[0]", "first_letters_of_{}", "first letters of the {}", false),
            transformation("{x}[-1]", "last_letters_of_{}", "last letters of the {}", false),
            transformation("{x} + '!'", "exclamations_of_{}", "exclamations ('!' added) of the {}", false),
        ],
    },
    Collection {
        noun: "characters",
        kind: "str",
        arguments: &["text", "s", "string", "sentence"],
        elements: &["c", "char", "ch", "letter"],
        conditions: &[
            condition("{x} in 'aeiou'", "vowel_{}", "vowel {}"),
            condition("{x}.isdigit()", "digit_{}", "digit {}"),
            condition("{x}.isalpha()", "alphabetic_{}", "alphabetic {}"),
            condition("{x}.isupper()", "uppercase_{}", "upper-case {}"),
            condition("{x}.islower()", "lowercase_{}", "lower-case {}"),
            condition("{x} != ' '", "nonspace_{}", "{} other than spaces"),
            with("{x} != '{k}'", "{}_except_{k}", "{} other than '{k}'", LETTERS),
            with("{x} > '{k}'", "{}_after_{k}", "{} that come after '{k}'", LETTERS),
        ],
        transformations: &[
            transformation("{x}.upper()", "uppercase_forms_of_{}", "upper-case forms of the {}", false),
            transformation("{x}.lower()", "lowercase_forms_of_{}", "lower-case forms of the {}", false),
            transformation("{x} * 2", "doubled_{}", "doubled forms of the {}", false),
            transformation("ord({x})", "codes_of_{}", "code points of the {}", true),
        ],
    },
];

/// The result of a program: how it is named, described and computed from `{e}` for each `{x}` of `{a}`.
struct Outcome {
    name: &'static str,
    phrase: &'static str,
    body: &'static [&'static str],
    /// What it can be taken of.
    of: Of,
}

#[derive(PartialEq)]
enum Of {
    /// Elements as they are, with a condition.
    Condition,
    /// Numbers, transformed or not.
    Numbers,
    /// Strings, transformed or not.
    Strings,
    /// Anything.
    Anything,
    /// Transformed elements only.
    Transformed,
}

/// `{if}` begins the conditional part of an expression, a line `{when}` holds the condition of a loop and indents the
/// lines after it that begin with `>`.
const OUTCOMES: [Outcome; 22] = [
    Outcome {
        name: "sum_of_{}",
        phrase: "Return the sum of the {}",
        body: &["total = 0", "for {x} in {a}:", "{when}", ">total += {e}", "return total"],
        of: Of::Numbers,
    },
    Outcome {
        name: "product_of_{}",
        phrase: "Return the product of the {}",
        body: &["product = 1", "for {x} in {a}:", "{when}", ">product *= {e}", "return product"],
        of: Of::Numbers,
    },
    Outcome {
        name: "total_of_{}",
        phrase: "Add up the {}",
        body: &["return sum({e} for {x} in {a}{if})"],
        of: Of::Numbers,
    },
    Outcome {
        name: "count_{}",
        phrase: "Return the number of {}",
        body: &["count = 0", "for {x} in {a}:", "{when}", ">count += 1", "return count"],
        of: Of::Condition,
    },
    Outcome {
        name: "list_{}",
        phrase: "Return a list of the {}",
        body: &["return [{e} for {x} in {a}{if}]"],
        of: Of::Anything,
    },
    Outcome {
        name: "collect_{}",
        phrase: "Collect the {} in a list",
        body: &["result = []", "for {x} in {a}:", "{when}", ">result.append({e})", "return result"],
        of: Of::Anything,
    },
    Outcome {
        name: "max_of_{}",
        phrase: "Return the largest of the {}, or None if there are none",
        body: &["return max(({e} for {x} in {a}{if}), default=None)"],
        of: Of::Anything,
    },
    Outcome {
        name: "min_of_{}",
        phrase: "Return the smallest of the {}, or None if there are none",
        body: &["return min(({e} for {x} in {a}{if}), default=None)"],
        of: Of::Anything,
    },
    Outcome {
        name: "largest_of_{}",
        phrase: "Find the largest of the {} with a loop, or None",
        body: &[
            "largest = None",
            "for {x} in {a}:",
            "{when}",
            ">if largest is None or {e} > largest:",
            ">    largest = {e}",
            "return largest",
        ],
        of: Of::Numbers,
    },
    Outcome {
        name: "average_of_{}",
        phrase: "Return the average of the {}, or 0 if there are none",
        body: &[
            "values_found = [{e} for {x} in {a}{if}]",
            "if not values_found:",
            "    return 0",
            "return sum(values_found) / len(values_found)",
        ],
        of: Of::Numbers,
    },
    Outcome {
        name: "has_{}",
        phrase: "Return True if there are any {}",
        body: &["return any({c} for {x} in {a})"],
        of: Of::Condition,
    },
    Outcome {
        name: "only_{}",
        phrase: "Return True if there are only {}",
        body: &["for {x} in {a}:", "    if not ({c}):", "        return False", "return True"],
        of: Of::Condition,
    },
    Outcome {
        name: "first_of_{}",
        phrase: "Return the first of the {}, or None",
        body: &["for {x} in {a}:", "{when}", ">return {e}", "return None"],
        of: Of::Condition,
    },
    Outcome {
        name: "last_of_{}",
        phrase: "Return the last of the {}, or None",
        body: &["result = None", "for {x} in {a}:", "{when}", ">result = {e}", "return result"],
        of: Of::Anything,
    },
    Outcome {
        name: "indices_of_{}",
        phrase: "Return the indices of the {}",
        body: &["return [i for i, {x} in enumerate({a}){if}]"],
        of: Of::Condition,
    },
    Outcome {
        name: "distinct_{}",
        phrase: "Return the distinct {} in sorted order",
        body: &["return sorted({{e} for {x} in {a}{if}})"],
        of: Of::Anything,
    },
    Outcome {
        name: "count_distinct_{}",
        phrase: "Return how many distinct {} there are",
        body: &["seen = set()", "for {x} in {a}:", "{when}", ">seen.add({e})", "return len(seen)"],
        of: Of::Anything,
    },
    Outcome {
        name: "sorted_{}",
        phrase: "Return the {} in sorted order",
        body: &["return sorted({e} for {x} in {a}{if})"],
        of: Of::Anything,
    },
    Outcome {
        name: "descending_{}",
        phrase: "Return the {} from largest to smallest",
        body: &["result = [{e} for {x} in {a}{if}]", "result.sort(reverse=True)", "return result"],
        of: Of::Anything,
    },
    Outcome {
        name: "counts_of_{}",
        phrase: "Return a dictionary that counts the {}",
        body: &["counts = {}", "for {x} in {a}:", "{when}", ">counts[{e}] = counts.get({e}, 0) + 1", "return counts"],
        of: Of::Anything,
    },
    Outcome {
        name: "map_to_{}",
        phrase: "Return a dictionary from each element to its value among the {}",
        body: &["result = {}", "for {x} in {a}:", "{when}", ">result[{x}] = {e}", "return result"],
        of: Of::Transformed,
    },
    Outcome {
        name: "join_{}{s}",
        phrase: "Join the {} with '{j}'",
        body: &["return '{j}'.join({e} for {x} in {a}{if})"],
        of: Of::Strings,
    },
];

/// Separators of joined strings, and what names call them.
const SEPARATORS: [(&str, &str); 5] =
    [("-", "_with_dashes"), (", ", "_with_commas"), (" ", "_with_spaces"), ("", ""), ("/", "_with_slashes")];
/// Chance that a name leaves out the noun where only a transformation is left: `sum_of_squares`.
const SHORT_NAME_SHARE: f64 = 0.5;

/// Draws a program.
pub(super) fn draw(rng: &mut ChaCha8Rng) -> Function {
    let collection = &COLLECTIONS[rng.random_range(0..COLLECTIONS.len())];
    let (mut name, mut phrase) = (collection.noun.to_owned(), collection.noun.to_owned());
    let element = pick(collection.elements, rng);
    let argument = pick(collection.arguments, rng);
    let mut conditions: Vec<String> = Vec::new();
    let wanted = usize::from(rng.random_bool(CONDITION_SHARE)) + usize::from(rng.random_bool(SECOND_CONDITION_SHARE));
    for condition in collection.conditions.choose_multiple(rng, wanted) {
        // Two phrases after the noun would read as one condition on the other.
        let follows = condition.phrase.starts_with("{}");
        if follows && phrase != collection.noun && !phrase.ends_with(collection.noun) {
            continue;
        }
        let k = condition.constants.choose(rng).copied().unwrap_or("");
        name = condition.name.replace("{}", &name).replace("{k}", k);
        phrase = condition.phrase.replace("{}", &phrase).replace("{k}", k);
        conditions.push(condition.code.replace("{x}", element).replace("{k}", k));
    }
    let transformation = collection.transformations.choose(rng).filter(|_| rng.random_bool(TRANSFORMATION_SHARE));
    let mut expression = element.to_owned();
    let mut numeric = collection.kind == "list[int]";
    if let Some(t) = transformation {
        let short = conditions.is_empty() && t.name.ends_with("_of_{}") && rng.random_bool(SHORT_NAME_SHARE);
        name = if short { t.name.replace("_of_{}", "") } else { t.name.replace("{}", &name) };
        phrase = t.phrase.replace("{}", &phrase);
        expression = t.code.replace("{x}", element);
        numeric = t.numeric;
    }
    let fits = |outcome: &&Outcome| match outcome.of {
        Of::Condition => !conditions.is_empty() && transformation.is_none(),
        Of::Numbers => numeric,
        Of::Strings => !numeric,
        Of::Anything => transformation.is_some() || !conditions.is_empty(),
        Of::Transformed => transformation.is_some(),
    };
    let outcomes: Vec<&Outcome> = OUTCOMES.iter().filter(fits).collect();
    let outcome = outcomes.choose(rng).copied().unwrap_or(&OUTCOMES[0]);
    let (separator, spoken) = SEPARATORS[rng.random_range(0..SEPARATORS.len())];
    let condition = conditions.join(" and ");
    let slots = [
        ("{x}", element),
        ("{a}", argument),
        ("{e}", expression.as_str()),
        ("{c}", condition.as_str()),
        ("{j}", separator),
    ];
    let fill = |text: &str| slots.iter().fold(text.to_owned(), |text, (slot, value)| text.replace(slot, value));
    Function {
        name: outcome.name.replace("{}", &name).replace("{s}", spoken),
        needs_description: false,
        arguments: vec![(argument.to_owned(), collection.kind.to_owned())],
        description: format!("{} in {argument}.", fill(&outcome.phrase.replace("{}", &phrase))),
        body: body(outcome, &condition, fill),
        calls: (0..CALLS).map(|i| collection_literal(collection.kind, i, rng)).collect(),
    }
}

fn pick(list: &'static [&'static str], rng: &mut ChaCha8Rng) -> &'static str {
    list.choose(rng).copied().unwrap_or("x")
}

fn body(outcome: &Outcome, condition: &str, fill: impl Fn(&str) -> String) -> Vec<String> {
    let suffix = if condition.is_empty() { String::new() } else { format!(" if {condition}") };
    let depth = if condition.is_empty() { "    " } else { "        " };
    outcome
        .body
        .iter()
        .filter(|line| **line != "{when}" || !condition.is_empty())
        .map(|line| match line.strip_prefix('>') {
            Some(inner) => format!("{depth}{}", fill(inner)),
            None if *line == "{when}" => format!("    if {condition}:"),
            None => fill(&line.replace("{if}", &suffix)),
        })
        .collect()
}

const WORD_POOL: [&str; 16] = [
    "level", "Apple", "stone", "a", "MAX", "tree", "noon", "banana", "sky", "river", "Moon", "ion", "cat", "DATA",
    "east", "mirror",
];

/// A literal for the tests; the first is empty.
fn collection_literal(kind: &str, index: usize, rng: &mut ChaCha8Rng) -> String {
    let len = if index == 0 { 0 } else { rng.random_range(2..8) };
    match kind {
        "list[int]" => {
            let numbers: Vec<String> = (0..len).map(|_| rng.random_range(-20..=120).to_string()).collect();
            format!("[{}]", numbers.join(", "))
        }
        "list[str]" => {
            let words: Vec<String> =
                (0..len).map(|_| format!("'{}'", WORD_POOL[rng.random_range(0..WORD_POOL.len())])).collect();
            format!("[{}]", words.join(", "))
        }
        _ => {
            let words: Vec<&str> = (0..len.min(3)).map(|_| WORD_POOL[rng.random_range(0..WORD_POOL.len())]).collect();
            let digits = if index > 0 { rng.random_range(0..100).to_string() } else { String::new() };
            format!("'{}{digits}'", words.join(" "))
        }
    }
}
