//! Says which generation this machine is of, waits for the next, and says that too.

use vm_run_generation::Generation;

fn main() -> std::io::Result<()> {
    let Some(mut generation) = Generation::open()? else {
        println!("none");
        return Ok(());
    };
    loop {
        println!("generation={}", generation.last());
        generation.wait(None)?;
    }
}
