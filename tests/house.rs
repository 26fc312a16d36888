//! The house stands: a module of `src` imports only modules below it, so that a reader can begin
//! at the bottom or at the top and never goes round in a circle; and a function fits on a screen.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};

use kv54::methods::METHODS;
use kv54::rpc::Meter;

/// The longest function, in lines, from its `fn` to its closing brace.
const MAX_FUNCTION: usize = 40;

/// The modules from the top to the bottom. Those in one line do not import each other.
const FLOORS: [&[&str]; 17] = [
    &["main"],
    &["commands"],
    &["beyond"],
    &["node"],
    &["server"],
    &["client", "join"],
    &["doubt"],
    &["replicas"],
    &["store"],
    &["status"],
    &["entry"],
    &["rpc"],
    &["cluster"],
    &["methods"],
    &["error"],
    &["sabotage"],
    &["lib"], // names every module, imports none
];

#[test]
fn imports_run_downwards() {
    let mut climbing = Vec::new();
    for (path, text) in files() {
        let module = module_of(&path);
        for (line, import) in imports(&text) {
            if import != module && floor(&import) <= floor(&module) {
                let place = path.display();
                climbing.push(format!("{place}:{line}: {module} imports crate::{import}"));
            }
        }
    }
    assert!(climbing.is_empty(), "climbing:\n{}", climbing.join("\n"));
}

/// Small is the feature. A change that needs more lines than this takes others away.
#[test]
fn the_house_is_small() {
    let lines = |(_, text): &(PathBuf, String)| text.lines().count();
    let (commands, rest): (Vec<_>, Vec<_>) = files()
        .into_iter()
        .partition(|(path, _)| module_of(path) == "commands");
    let (commands, rest): (usize, usize) = (
        commands.iter().map(lines).sum(),
        rest.iter().map(lines).sum(),
    );
    assert!(rest <= 13_950, "src without the commands has {rest} lines");
    assert!(
        rest + commands <= 17_785,
        "src has {} lines",
        rest + commands
    );
}

#[test]
fn every_method_is_answered_and_documented() {
    let server = fs::read_to_string("src/server.rs").unwrap();
    let arms = server
        .lines()
        .filter(|line| line.trim_start().starts_with("(\""));
    let methods = arms.map(|arm| arm.split(',').next().unwrap());
    let mut answered: Vec<&str> = Vec::new();
    for method in methods.flat_map(|methods| methods.split('"').skip(1).step_by(2)) {
        if !answered.contains(&method) {
            answered.push(method); // a second arm may have its other parameters
        }
    }
    let names: Vec<&str> = METHODS
        .lines()
        .map(|row| row.split('`').nth(1).unwrap())
        .collect();
    assert_eq!(answered, names, "src/server.rs and src/methods.rs");
    let counted: Vec<&str> = Meter::default().answered().map(|(name, _)| name).collect();
    assert_eq!(counted, names, "src/rpc/meter.rs");
    let wire = fs::read_to_string("docs/wire.md").unwrap();
    let table = format!("| method | parameters | answer |\n| --- | --- | --- |\n{METHODS}\n");
    assert!(wire.contains(&table), "docs/wire.md lacks:\n{table}");
}

#[test]
fn every_way_to_name_a_module_is_seen() {
    let text = "use crate::a::B;
/// `crate::no::matter`
use crate::{
    b::{C, D}, // crate::nor::this
    c,
};
pub(crate) fn e() { crate::d::f(crate::{g::h}) }";
    let seen = imports(text);
    let seen: Vec<(usize, &str)> = seen.iter().map(|(line, name)| (*line, &**name)).collect();
    assert_eq!(seen, [(1, "a"), (4, "b"), (5, "c"), (7, "d"), (7, "g")]);
}

#[test]
fn functions_fit_on_a_screen() {
    let mut long = Vec::new();
    for (path, text) in files() {
        for (line, length) in functions(&text) {
            if length > MAX_FUNCTION {
                long.push(format!("{}:{line}: {length} lines", path.display()));
            }
        }
    }
    assert!(
        long.is_empty(),
        "{} too long:\n{}",
        long.len(),
        long.join("\n")
    );
}

#[test]
fn a_function_is_measured_from_its_first_line_to_its_last() {
    let text = "
    fn declared(&self);

    pub(crate) async fn defined(
        &self,
    ) -> u8
    where
        Self: Sized,
    {
        || { fn_like(); }
    }
fn short() {} // done
";
    assert_eq!(functions(text), [(2, 1), (4, 8), (12, 1)]);
}

/// Every file of `src` and its text.
fn files() -> Vec<(PathBuf, String)> {
    let (mut files, mut found) = (Vec::new(), vec![PathBuf::from("src")]);
    while let Some(path) = found.pop() {
        if path.is_dir() {
            let inside = fs::read_dir(&path).unwrap();
            found.extend(inside.map(|file| file.unwrap().path()));
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            files.push((path, text));
        }
    }
    files.sort();
    files
}

/// The module at the crate's root that a file belongs to.
fn module_of(path: &Path) -> String {
    let inside = path.iter().nth(1).unwrap().to_str().unwrap();
    inside.trim_end_matches(".rs").to_owned()
}

fn floor(module: &str) -> usize {
    let floor = FLOORS.iter().position(|floor| floor.contains(&module));
    floor.unwrap_or_else(|| panic!("{module} has no place in FLOORS"))
}

/// A line without its comment.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

/// The modules that a file names by `crate::`, each with its line.
fn imports(text: &str) -> Vec<(usize, String)> {
    let text = text.lines().map(code).collect::<Vec<&str>>().join("\n");
    let mut imports = Vec::new();
    for (start, path) in text.match_indices("crate::") {
        let (start, mut depth, mut begins) = (start + path.len(), 0, true);
        for (at, letter) in text[start..].char_indices() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => begins = true,
                _ if begins && is_of_name(letter) => {
                    let (before, name) = text.split_at(start + at);
                    let name: String = name.chars().take_while(|c| is_of_name(*c)).collect();
                    imports.push((before.matches('\n').count() + 1, name));
                    begins = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    imports
}

/// The functions in a file as rustfmt writes it: the line where each begins, and how many it has.
fn functions(text: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = text.lines().map(code).collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let begins = |line: &str| {
        let mut words = line.split_whitespace();
        let word =
            words.find(|word| !word.starts_with("pub") && !["async", "const"].contains(word));
        word == Some("fn")
    };
    let begun = (0..lines.len()).filter(|at| begins(lines[*at]));
    let measured = begun.map(|at| {
        // It ends where a line that is indented as its first one closes it.
        let ends = |line: &&str| {
            indent(line) == indent(lines[at]) && line.trim_end().ends_with(['}', ';'])
        };
        let length = lines[at..].iter().position(ends);
        (at + 1, length.map_or(usize::MAX, |before| before + 1))
    });
    measured.collect()
}

fn is_of_name(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}
