//! What an entry says of files that are carried: they follow a user from login to login.
//!
//! Where to is the administrator's to say. The user has no part in it: neither by the name, which is put in after it is
//! known what is what, nor by directories on the way, which must be root's.

use std::path::{Component, Path};

use super::person::Person;
use super::settings::{Entry, Second, expand};
use super::trust;
use crate::carry::{Carry, Options};
use crate::duration;
use crate::error::Result;

impl Entry {
    /// What is carried for `person`, and how. No file is looked at.
    pub(super) fn carrying(&self, person: &Person) -> Result<Options, String> {
        let asked = [
            ("carry_deletes", self.carry_deletes),
            ("carry_rules", !self.carry_rules.is_empty()),
            ("carry_exclude", !self.carry_exclude.is_empty()),
            ("carry_include", !self.carry_include.is_empty()),
            ("carry_wait", self.carry_wait.is_some()),
            ("carry_recipient", self.carry_recipient.is_some()),
        ];
        let mut options = Options { of_user: true, ..Options::default() };
        if self.carry.is_empty() {
            let useless = asked.into_iter().find(|(_, asked)| *asked);
            return useless
                .map_or(Ok(options), |(key, _)| Err(format!("{key}: without carry nothing is carried")));
        }
        if self.second == Second::Join {
            return Err("carry: not with second = 'join': the root is nobody's login, and who leaves last could not be \
                        told what was not delivered; take 'own' or 'refuse'"
                .to_owned());
        }
        for text in &self.carry {
            options.carries.push(carry(text, person)?);
        }
        options.deletes = self.carry_deletes;
        options.exclude.clone_from(&self.carry_exclude);
        options.include.clone_from(&self.carry_include);
        if let Some(text) = &self.carry_wait {
            options.patience = duration::parse(text).map_err(|why| format!("carry_wait: {why}"))?;
        }
        options.recipient.clone_from(&self.carry_recipient);
        options.check().map_err(|error| format!("carry: {error}"))?;
        if let Some(file) = self.carry_rules.iter().find(|file| !file.is_absolute()) {
            return Err(format!("carry_rules: '{}' is no absolute path", file.display()));
        }
        options.rules.clone_from(&self.carry_rules);
        Ok(options)
    }
}

/// `PATH=DEST`. It is parted first, so that a name that is put in does not say where.
fn carry(text: &str, person: &Person) -> Result<Carry, String> {
    let wrong = || format!("carry: '{text}' does not parse; write PATH=DEST");
    let (path, destination) = text.split_once('=').ok_or_else(wrong)?;
    let (path, destination) = (expand("carry", path, person)?, expand("carry", destination, person)?);
    if let Some(letter) =
        text.split('%').nth(1).and_then(|rest| rest.chars().next()).filter(|letter| "ugUGh".contains(*letter))
    {
        // As other programs have it: everybody would share a directory that is called so.
        return Err(format!(
            "carry: '%{letter}' stands for nothing here; write {{user}}, {{uid}}, {{gid}} or {{home}}"
        ));
    }
    if destination.contains("://") {
        return Err(format!("carry: '{destination}' is no directory; mount it, and give where"));
    }
    let is_plain = |component| matches!(component, Component::RootDir | Component::Normal(_));
    let whole = Path::new(&destination);
    if !whole.is_absolute() || !whole.components().all(is_plain) {
        return Err(format!("carry: '{destination}' is no absolute path without '..'"));
    }
    Carry::new(path.into(), destination).map_err(|error| format!("carry: {error}"))
}

/// Looks whether the rules and the destinations are there, and nobody but root can have put others in their place.
///
/// # Errors
/// The first thing that stands in the way.
pub(super) fn verify(options: &Options) -> Result<()> {
    for file in &options.rules {
        trust::check(file)?;
    }
    options.check()?;
    options.check_encryption()?;
    options.carries.iter().try_for_each(|carry| trust::check_destination(Path::new(&carry.destination)))
}
