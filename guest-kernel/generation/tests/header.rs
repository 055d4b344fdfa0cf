//! The C header, by a C compiler and against a file: what a guest's kernel does is tested
//! in a guest.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Asks twice, with a line of input between.
const PROGRAM: &str = r#"
#include "vm_run_generation.h"
#include <stdio.h>
int main(int argc, char **argv)
{
    struct vm_run_generation g;
    int opened = vm_run_generation_open_at(&g, argv[argc - 1]);
    if (opened < 0) {
        printf("%d\n", opened);
        return 0;
    }
    printf("%llu %d\n", (unsigned long long)g.last, vm_run_generation_wait(&g, 10));
    fflush(stdout);
    getchar();
    int changed = vm_run_generation_wait(&g, -1);
    printf("%d %llu %d\n", changed, (unsigned long long)g.last, vm_run_generation_changed(&g));
    return 0;
}
"#;

#[test]
fn the_header_compiles_alone_and_tells_of_a_change() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str| dir.path().join(name);
    fs::write(file("program.c"), PROGRAM).expect("written");
    for standard in ["c11", "gnu17"] {
        compile(standard, &file("program.c"), &file("program"));
    }
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/generation.c");
    compile("c11", &example, &file("example"));

    let run = |script: &str| {
        let ran = Command::new("sh")
            .args(["-c", script])
            .current_dir(dir.path())
            .output();
        String::from_utf8(ran.expect("runs").stdout).expect("text")
    };
    assert_eq!(run("./example missing"), "none\n");
    assert_eq!(run("./program missing"), "-2\n");
    assert_eq!(run("echo x > file; ./program file"), "-22\n");
    assert_eq!(
        run("echo 18446744073709551616 > file; ./program file"),
        "-22\n"
    );
    let script =
        "echo 0 > file; (sleep 0.3; echo 18446744073709551615 > file; echo) | ./program file";
    assert_eq!(run(script), "0 0\n1 18446744073709551615 0\n");
}

fn compile(standard: &str, source: &Path, program: &Path) {
    let compiled = Command::new("cc")
        .args([
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-D_GNU_SOURCE",
            "-o",
        ])
        .arg(program)
        .arg(format!("-std={standard}"))
        .args(["-I", env!("CARGO_MANIFEST_DIR")])
        .arg(source)
        .status();
    assert!(compiled.expect("a C compiler").success());
}
