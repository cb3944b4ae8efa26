use std::path::Path;
use unmask_trainer::{recipe, tasks::Part};
fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().init();
    let a: Vec<String> = std::env::args().collect();
    match a[1].as_str() {
        "tokenizer" => recipe::tokenizer(&recipe::read(Path::new(&a[2]))?)?,
        "tasks" => println!("{}", recipe::write_tasks(Path::new(&a[2]), 9, Part::HeldOut, a[3].parse()?)?),
        "show" => {
            let t = unmask_trainer::tasks::Tasks::new()?;
            for i in 0..a[2].parse()? { println!("{}\n", t.draw(1, Part::Training, i).program()); }
        }
        _ => { recipe::mask(recipe::read(Path::new(&a[2]))?)?; }
    }
    Ok(())
}
