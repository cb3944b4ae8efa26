//! A compiled template with guards: before an operation what it reads is counted, after it what it made.
//!
//! The engine limits steps, and one step can double a string. It has no hook for its operators, so the guards are
//! filters, which stand in its own instructions around them.

use super::budget::{Budget, VALUE_BYTES, refused};
use minijinja::machinery::{Instruction, Instructions};
use minijinja::value::{Rest, Value};
use minijinja::{Environment, Error, State};

/// Most different attributes that a template sets.
const ATTRIBUTES_MAX: usize = 256;
/// Most entries of a list or map that is written out.
const ENTRIES_MAX: usize = 1024;
/// What defining a macro counts for (bytes): the engine copies the list of them.
const MACRO_BYTES: u64 = 64 << 10;

// Names that no template can write, but for those that `map` takes as text.
const READ: &str = "%read";
const PEEK: &str = "%peek";
const MADE: &str = "%made";
const HELD: &str = "%held";
const DEFINED: &str = "%defined";
/// No slot of the engine's filter cache.
const UNCACHED: u8 = !0;

/// The filters that the guards are.
pub(super) fn add_guards(environment: &mut Environment<'static>) {
    environment.add_filter(READ, |state: &State, values: Rest<Value>| -> Result<Value, Error> {
        Budget::of(state)?.read(&values, 1)?;
        Ok(back(&values))
    });
    environment.add_filter(PEEK, |state: &State, values: Rest<Value>| -> Result<Value, Error> {
        Budget::of(state)?.peek(&values)?;
        Ok(back(&values))
    });
    environment.add_filter(MADE, |state: &State, value: Value| Budget::of(state)?.made(value));
    environment.add_filter(HELD, |state: &State, value: Value| Budget::of(state)?.held(value));
    environment.add_filter(DEFINED, |state: &State, value: Value| -> Result<Value, Error> {
        Budget::of(state)?.make(MACRO_BYTES + VALUE_BYTES)?;
        Ok(value)
    });
}

/// What goes back to where a guard took it from: several values by way of a list.
fn back(values: &[Value]) -> Value {
    match values {
        [one] => one.clone(),
        several => Value::from(several.iter().rev().cloned().collect::<Vec<_>>()),
    }
}

/// The instructions with guards around them.
///
/// # Errors
/// Names what no chat template needs and nothing guards.
pub(super) fn guarded<'a>(plain: &Instructions<'a>) -> Result<Instructions<'a>, Error> {
    let mut guarded = Instructions::new(plain.name(), plain.source());
    let (mut moved, mut jumps, mut attributes) = (Vec::new(), Vec::new(), Vec::new());
    let all = (0..).map_while(|at| plain.get(at).map(|instruction| (at, instruction)));
    for (at, instruction) in all {
        moved.push(guarded.len() as u32);
        let line = plain.get_line(at).and_then(|line| u16::try_from(line).ok()).unwrap_or(0);
        let mut add = |instruction: Instruction<'a>| guarded.add_with_line(instruction, line);
        let (before, after) = around(instruction)?;
        before.into_iter().for_each(|guard| {
            add(guard);
        });
        let instruction = match instruction {
            // Printing is what is guarded.
            Instruction::EmitRaw(text) => {
                add(Instruction::LoadConst(Value::from(*text)));
                Instruction::Emit
            }
            other => other.clone(),
        };
        if let Instruction::SetAttr(name) = instruction
            && !attributes.contains(&name)
        {
            attributes.push(name);
            if attributes.len() > ATTRIBUTES_MAX {
                return Err(refused(format!("sets more than {ATTRIBUTES_MAX} attributes")));
            }
        }
        jumps.push(add(instruction));
        if let Some(guard) = after {
            add(guard);
        }
    }
    moved.push(guarded.len() as u32);
    for at in jumps {
        if let Some(
            Instruction::Iterate(target)
            | Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::BuildMacro(_, target, _),
        ) = guarded.get_mut(at)
        {
            *target = moved.get(*target as usize).copied().ok_or_else(|| refused("jumps nowhere".into()))?;
        }
    }
    Ok(guarded)
}

/// What stands before and behind an instruction.
fn around<'a>(instruction: &Instruction) -> Result<(Vec<Instruction<'a>>, Option<Instruction<'a>>), Error> {
    let guard = |name, values| Instruction::ApplyFilter(name, Some(values), UNCACHED);
    let before = |name, values: u16| match values {
        0 => Vec::new(),
        1 => vec![guard(name, 1)],
        several => vec![guard(name, several), Instruction::UnpackList(usize::from(several))],
    };
    let (read, peek) = (|values| before(READ, values), |values| before(PEEK, values));
    let made = Some(guard(MADE, 1));
    let no = |what: &str| Err(refused(format!("{what}, which chat templates have no use for")));
    Ok(match instruction {
        Instruction::Add | Instruction::StringConcat => (read(2), made),
        Instruction::GetItem => (peek(2), None),
        Instruction::Eq
        | Instruction::Ne
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::In
        | Instruction::CompareAndPreserve(_) => (read(2), None),
        Instruction::Slice => (read(4), made),
        Instruction::PushLoop(_) => (peek(1), None),
        Instruction::UnpackList(_) => (read(1), None),
        Instruction::PerformTest(name, Some(1), _) if !matches!(*name, "lower" | "upper") => (peek(1), None),
        Instruction::PerformTest(_, Some(values), _) => (read(*values), None),
        Instruction::CallMethod(_, Some(values)) => (read(*values), made),
        Instruction::BuildList(Some(entries)) if *entries <= ENTRIES_MAX => (read(*entries as u16), made),
        Instruction::BuildMap(entries) if *entries <= ENTRIES_MAX => (read(2 * *entries as u16), made),
        Instruction::BuildList(Some(_)) | Instruction::BuildMap(_) => {
            return Err(refused(format!("writes out a list of more than {ENTRIES_MAX} entries")));
        }
        Instruction::SetAttr(_) => (vec![Instruction::Swap, guard(HELD, 1), Instruction::Swap], None),
        Instruction::BuildMacro(..) => (vec![guard(DEFINED, 1)], None),
        Instruction::Mul => return no("multiplies"),
        Instruction::BuildList(None) | Instruction::UnpackLists(_) | Instruction::MergeKwargs(_) => {
            return no("spreads a list over arguments");
        }
        Instruction::PerformTest(_, None, _) | Instruction::CallMethod(_, None) => {
            return no("spreads a list over arguments");
        }
        Instruction::ApplyFilter(_, None, _) | Instruction::CallFunction(_, None) | Instruction::CallObject(None) => {
            return no("spreads a list over arguments");
        }
        Instruction::PushAutoEscape | Instruction::PopAutoEscape => return no("escapes"),
        Instruction::CallBlock(_)
        | Instruction::FastSuper
        | Instruction::LoadBlocks
        | Instruction::Include(_)
        | Instruction::ExportLocals => return no("has blocks or other templates"),
        // The rest makes nothing, or numbers only, or is guarded where it is called.
        _ => (Vec::new(), None),
    })
}
