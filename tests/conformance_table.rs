//! `docs/conformance.md` says of every rule of the specification which test holds memdev to it. Here the table is held to
//! the tests: what it names exists, and every rule has a test or a reason to have none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A rule and who holds memdev to it.
struct Row {
    line: usize,
    rule: String,
    test: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rows of all tables, without their heads.
fn rows() -> Vec<Row> {
    let page = fs::read_to_string(root().join("docs/conformance.md")).expect("the table is there");
    let mut rows = Vec::new();
    for (line, text) in (1..).zip(page.lines()) {
        let Some(inside) = text.strip_prefix('|').and_then(|text| text.strip_suffix('|')) else {
            assert!(!text.starts_with('|'), "line {line} is half a row");
            continue;
        };
        let cells: Vec<&str> = inside.split('|').map(str::trim).collect();
        let [rule, done, test] = cells[..] else { panic!("line {line} has {} cells", cells.len()) };
        if rule == "rule" || rule.starts_with("---") {
            continue;
        }
        assert!(!done.is_empty(), "line {line} does not say what is done");
        rows.push(Row { line, rule: rule.to_owned(), test: test.to_owned() });
    }
    rows
}

/// The file that a test is said to be in.
fn file(name: &str) -> PathBuf {
    let from_root = name.starts_with("src/") || name.starts_with("tests/");
    if from_root { root().join(name) } else { root().join("tests").join(name) }
}

/// The names of all tests in a file.
fn tests_in(path: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut names = BTreeSet::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim) {
        if line == "#[test]" {
            is_test = true;
        } else if let Some((name, _)) = line.strip_prefix("fn ").and_then(|line| line.split_once('(')) {
            if is_test {
                names.insert(name.to_owned());
            }
            is_test = false;
        }
    }
    names
}

/// What stands between backticks in a cell.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn every_rule_has_a_test_that_exists_or_a_reason() {
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for Row { line, rule, test } in rows() {
        if let Some(reason) = test.strip_prefix("not applicable") {
            if reason.trim_start_matches(':').trim().is_empty() {
                wrong.push(format!("line {line}: no reason"));
            }
            continue;
        }
        let named = quoted(&test);
        if named.is_empty() {
            wrong.push(format!("line {line}: neither a test nor \"not applicable: REASON\" for {rule:?}"));
        }
        for name in named {
            let Some((path, function)) = name.split_once("::") else {
                wrong.push(format!("line {line}: {name:?} is no FILE::TEST"));
                continue;
            };
            if !file(path).is_file() {
                wrong.push(format!("line {line}: there is no {path}"));
                continue;
            }
            let tests = files.entry(path.to_owned()).or_insert_with(|| tests_in(&file(path)));
            if !tests.contains(function) {
                wrong.push(format!("line {line}: {path} has no test {function}"));
            }
        }
    }
    assert!(wrong.is_empty(), "docs/conformance.md:\n{}", wrong.join("\n"));
}

#[test]
fn every_row_is_a_rule() {
    for Row { line, rule, .. } in rows() {
        let words = ["MUST", "SHOULD", "recommended"];
        assert!(words.iter().any(|word| rule.contains(word)), "line {line}: {rule:?} asks for nothing");
    }
    assert!(rows().len() > 150, "rows were lost");
}

/// The same for the pages that name a test, or a file of tests, with each of their claims.
#[test]
fn tests_that_other_pages_name_exist() {
    let mut wrong = Vec::new();
    for page in ["docs/threat-model.md", "docs/design.md"] {
        let text = fs::read_to_string(root().join(page)).expect("the page is there");
        let mut named = 0;
        for name in text.lines().flat_map(quoted) {
            let (path, function) =
                name.split_once("::").map_or((name, None), |(path, name)| (path, Some(name)));
            if !path.contains(".rs") {
                continue;
            }
            named += 1;
            if !file(path).is_file() {
                wrong.push(format!("{page}: there is no {path}"));
            } else if function.is_some_and(|function| !tests_in(&file(path)).contains(function)) {
                wrong.push(format!("{page}: no test {name}"));
            }
        }
        assert!(named > 5, "{page} names its tests");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
