//! How an output must begin: the ways to spell what the prompt's tokens leave out.
//!
//! A tokenizer merges across the place where a text ends, so one that ends inside a word has tokens that its model
//! hardly ever saw before what follows. The last word is left to the model instead, which may spell it with any tokens
//! that agree with what was typed, and reach beyond it ("token healing").

/// Most units an opening has (bytes of text, for example).
pub const OPENING_LEN_MAX: usize = 64;
/// Most choices of an opening, of all places together.
pub const OPENING_CHOICES_MAX: usize = 1 << 16;
/// A token that ends inside the opening is taken only where it is likelier by this much (nats) than each that reaches its
/// end: models trained on prompts that end anywhere give such tokens more than they deserve. (3, 5 and 8 do as well.)
const ENDS_INSIDE: f32 = 5.0;

/// A token that can stand at a place of the opening.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// The place behind it; at the end of the opening or beyond, anything may follow.
    pub next: u32,
}

/// Ways to begin an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening(Vec<Vec<Choice>>);

impl Opening {
    /// An opening of as many units as there are `places`, each with what can stand there.
    ///
    /// # Errors
    /// It is empty or too large, a choice does not lead on, or one leads to where there is none.
    pub fn new(mut places: Vec<Vec<Choice>>) -> Result<Self, String> {
        let (len, choices) = (places.len(), places.iter().map(Vec::len).sum::<usize>());
        if !(1..=OPENING_LEN_MAX).contains(&len) || choices > OPENING_CHOICES_MAX {
            return Err(format!(
                "has {len} places with {choices} choices, must have 1 to {OPENING_LEN_MAX} with at most {OPENING_CHOICES_MAX}"
            ));
        }
        let mut reached = vec![false; len];
        reached[0] = true;
        for (place, choices) in places.iter_mut().enumerate() {
            if reached[place] && choices.is_empty() {
                return Err(format!("place {place} has no choice"));
            }
            for choice in choices.iter() {
                if choice.next as usize <= place {
                    return Err(format!("token {} at place {place} does not lead on", choice.token));
                }
                reached.get_mut(choice.next as usize).into_iter().for_each(|reached| *reached = true);
            }
            choices.sort_unstable_by_key(|choice| choice.token);
        }
        Ok(Self(places))
    }

    /// The largest token in it.
    pub fn largest_token(&self) -> u32 {
        self.0.iter().flatten().map(|choice| choice.token).max().unwrap_or(0)
    }

    /// What can follow `output`, ascending by token; `None` where anything can, or nothing that the opening knows.
    pub fn after(&self, output: &[u32]) -> Option<&[Choice]> {
        let mut place = 0;
        for token in output {
            let choices = self.0.get(place)?;
            let at = choices.binary_search_by_key(token, |choice| choice.token).ok()?;
            place = choices[at].next as usize;
        }
        self.0.get(place).map(Vec::as_slice)
    }

    /// Those of `choices` that may be drawn by `logits`, ascending, into `tokens`: those that reach the end of the
    /// opening, unless one that ends inside it is far likelier.
    pub fn favoured(&self, choices: &[Choice], logits: &[f32], tokens: &mut Vec<u32>) {
        let reaches = |choice: &&Choice| choice.next as usize >= self.0.len();
        let best = |inside: bool| {
            let of = choices.iter().filter(|choice| reaches(choice) != inside);
            of.filter_map(|choice| logits.get(choice.token as usize)).copied().fold(f32::NEG_INFINITY, f32::max)
        };
        let all = best(true) > best(false) + ENDS_INSIDE;
        tokens.clear();
        tokens.extend(choices.iter().filter(|choice| all || reaches(choice)).map(|choice| choice.token));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn places(places: &[&[(u32, u32)]]) -> Vec<Vec<Choice>> {
        places.iter().map(|at| at.iter().map(|&(token, next)| Choice { token, next }).collect()).collect()
    }

    /// Two units: 5 spells the first, 6 the second, 3 both, 9 both and more.
    fn opening() -> Opening {
        Opening::new(places(&[&[(9, 4), (5, 1), (3, 2)], &[(6, 2)]])).unwrap()
    }

    #[test]
    fn outputs_walk_through_it_to_its_end() {
        let tokens = |output: &[u32]| -> Option<Vec<u32>> {
            opening().after(output).map(|choices| choices.iter().map(|choice| choice.token).collect())
        };
        assert_eq!(tokens(&[]), Some(vec![3, 5, 9]));
        assert_eq!(tokens(&[5]), Some(vec![6]));
        for over in [&[3][..], &[9], &[5, 6], &[3, 8]] {
            assert_eq!(tokens(over), None);
        }
        // Whoever gives something else gets no help.
        assert_eq!(tokens(&[7]), None);
    }

    #[test]
    fn what_reaches_the_end_goes_first() {
        let (opening, mut tokens) = (opening(), Vec::new());
        let mut favoured = |logits: &[f32]| {
            opening.favoured(opening.after(&[]).unwrap(), logits, &mut tokens);
            tokens.clone()
        };
        let logits = |inside: f32| [0.0, 0.0, 0.0, 1.0, 0.0, inside, 0.0, 0.0, 0.0, 2.0];
        assert_eq!(favoured(&logits(6.9)), [3, 9]);
        assert_eq!(favoured(&logits(7.1)), [3, 5, 9]);
        opening.favoured(opening.after(&[5]).unwrap(), &logits(0.0), &mut tokens);
        assert_eq!(tokens, [6]);
    }

    #[test]
    fn dead_ends_and_circles_are_refused() {
        for (wrong, says) in [
            (places(&[]), "0 places"),
            (places(&[&[]]), "place 0 has no choice"),
            (places(&[&[(1, 1)], &[]]), "place 1 has no choice"),
            (places(&[&[(1, 0)]]), "does not lead on"),
            (vec![vec![Choice { token: 1, next: 70 }]; OPENING_LEN_MAX + 1], "65 places"),
        ] {
            let error = Opening::new(wrong).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        // Nothing leads to the second place.
        assert!(Opening::new(places(&[&[(1, 2)], &[]])).is_ok());
    }
}
