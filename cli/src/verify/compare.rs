//! What differs between a reference and what was computed.

use super::golden::ids;
use serde_json::Value;

/// Largest absolute difference of logits.
const LOGITS_TOLERANCE: f32 = 1e-3;
/// Largest difference of confidences.
const CONFIDENCE_TOLERANCE: f64 = 5e-4;

/// Outcome of one comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Within tolerance, or exactly equal where that is asked.
    Same,
    /// There is no answer to compare with.
    Computed,
    /// The first difference.
    Differs(String),
}

/// Logits; also their largest absolute difference.
pub fn logits(expected: &Option<Vec<f32>>, actual: &Result<Vec<f32>, String>) -> (Verdict, f32) {
    let actual = match actual {
        Ok(actual) => actual,
        Err(error) => return (Verdict::Differs(error.clone()), 0.0),
    };
    let Some(expected) = expected else { return (Verdict::Computed, 0.0) };
    if expected.len() != actual.len() {
        return (Verdict::Differs(format!("{} values, expected {}", actual.len(), expected.len())), f32::INFINITY);
    }
    let worst = expected.iter().zip(actual).map(|(e, a)| (e - a).abs()).fold(0.0, largest);
    if worst <= LOGITS_TOLERANCE {
        return (Verdict::Same, worst);
    }
    (Verdict::Differs(format!("largest error {worst:e} exceeds {LOGITS_TOLERANCE:e}")), worst)
}

/// The larger; not a number counts as the largest.
fn largest(a: f32, b: f32) -> f32 {
    if b.is_nan() { f32::INFINITY } else { a.max(b) }
}

/// A decode: ids, commits, edits and totals exactly; confidences within tolerance.
pub fn decode(case: &Value, actual: &Result<Value, String>) -> Verdict {
    let actual = match actual {
        Ok(actual) => actual,
        Err(error) => return Verdict::Differs(error.clone()),
    };
    if case.get("output_ids").is_none() {
        return Verdict::Computed;
    }
    let paths = [
        ("output_ids", ""),
        ("answer_ids", ""),
        ("commits", "position"),
        ("commits", "token"),
        ("commits", "pass"),
        ("edits", "position"),
        ("edits", "old"),
        ("edits", "new"),
        ("edits", "pass"),
        ("totals", "denoise"),
        ("totals", "decode"),
    ];
    for (key, inner) in paths {
        let pick = |value: &Value| if inner.is_empty() { value[key].clone() } else { value[key][inner].clone() };
        let expected = pick(case);
        // Loops that never edit have no edits in the reference.
        if !expected.is_null() && expected != pick(actual) {
            return Verdict::Differs(first_difference(&format!("{key} {inner}"), &expected, &pick(actual)));
        }
    }
    for key in ["commits", "edits"] {
        if let Some(how) = confidences(&case[key]["confidence"], &actual[key]["confidence"], key) {
            return Verdict::Differs(how);
        }
    }
    Verdict::Same
}

fn confidences(expected: &Value, actual: &Value, key: &str) -> Option<String> {
    let (expected, actual) = (expected.as_array()?, actual.as_array()?);
    expected.iter().zip(actual).enumerate().find_map(|(i, (e, a))| {
        let (e, a) = (e.as_f64()?, a.as_f64()?);
        let differs = (e - a).abs() > CONFIDENCE_TOLERANCE;
        differs.then(|| format!("{key} confidence {i}: {a}, expected {e}"))
    })
}

fn first_difference(what: &str, expected: &Value, actual: &Value) -> String {
    let what = what.trim();
    match (expected.as_array(), actual.as_array()) {
        (Some(expected), Some(actual)) => {
            let at = expected.iter().zip(actual).position(|(e, a)| e != a).unwrap_or(expected.len().min(actual.len()));
            let show = |list: &[Value]| list.get(at).map_or_else(|| "nothing".to_owned(), ToString::to_string);
            format!("{what} at {at}: {}, expected {}", show(actual), show(expected))
        }
        _ => format!("{what}: {actual}, expected {expected}"),
    }
}

/// A tokenizer case: every list of ids and every text exactly.
pub fn tokenizer(case: &Value, actual: &Result<Value, String>) -> Verdict {
    let actual = match actual {
        Ok(actual) => actual,
        Err(error) => return Verdict::Differs(error.clone()),
    };
    let keys = ["ids", "ids_with_special", "ids_specials_as_text", "decoded", "decoded_skip_special"];
    if keys.iter().all(|key| case.get(*key).is_none()) {
        return Verdict::Computed;
    }
    for key in keys {
        let expected = &case[key];
        let same = match ids(expected) {
            Some(expected) => ids(&actual[key]) == Some(expected),
            None => expected.is_null() || *expected == actual[key],
        };
        if !same {
            return Verdict::Differs(first_difference(&format!("{key} of {}", case["text"]), expected, &actual[key]));
        }
    }
    Verdict::Same
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_first_difference_is_named() {
        let case = json!({ "output_ids": [1, 2, 3], "answer_ids": [1, 2] });
        let same = Ok(json!({ "output_ids": [1, 2, 3], "answer_ids": [1, 2] }));
        assert_eq!(decode(&case, &same), Verdict::Same);
        let other = Ok(json!({ "output_ids": [1, 9, 3], "answer_ids": [1, 9] }));
        assert_eq!(decode(&case, &other), Verdict::Differs("output_ids at 1: 9, expected 2".into()));
        assert_eq!(decode(&json!({ "id": "x" }), &same), Verdict::Computed);
        assert_eq!(decode(&case, &Err("no".into())), Verdict::Differs("no".into()));
    }

    #[test]
    fn confidences_have_a_tolerance_and_nan_is_never_close() {
        let case = json!({ "output_ids": [], "commits": { "confidence": [0.5] } });
        let actual = |c: f64| Ok(json!({ "output_ids": [], "commits": { "confidence": [c] } }));
        assert_eq!(decode(&case, &actual(0.5004)), Verdict::Same);
        assert_ne!(decode(&case, &actual(0.51)), Verdict::Same);
        assert!(matches!(logits(&Some(vec![1.0]), &Ok(vec![f32::NAN])).0, Verdict::Differs(_)));
        assert_eq!(logits(&Some(vec![1.0]), &Ok(vec![1.0005])).0, Verdict::Same);
        assert_eq!(logits(&None, &Ok(vec![1.0])).0, Verdict::Computed);
    }
}
