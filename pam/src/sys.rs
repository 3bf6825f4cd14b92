//! The talk with libpam.
//!
//! # Safety
//! libpam gives the handle to the module's functions, and it is good until they return; so it is passed on to libpam, and
//! never kept. Strings that libpam gives are C strings of its own that it keeps until the item is set anew, which does not
//! happen while a function of the module runs: they are copied at once. The one pointer that is given to libpam is a box's,
//! under a name that nobody else uses, with a function that drops it once. A panic never leaves the module: it is a
//! failure.

#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use memdev::login::pam::Inside;

/// libpam's handle, of which nothing is known here.
#[repr(C)]
pub(crate) struct Handle {
    _private: [u8; 0],
}

const PAM_SUCCESS: c_int = 0;
const PAM_SESSION_ERR: c_int = 14;
const PAM_SERVICE: c_int = 1;
const PAM_ERROR_MSG: c_int = 3;

/// Under which name libpam keeps the session.
const KEPT: &CStr = c"memdev_private_root";

type Cleanup = unsafe extern "C" fn(*mut Handle, *mut c_void, c_int);

unsafe extern "C" {
    fn pam_get_user(handle: *mut Handle, user: *mut *const c_char, prompt: *const c_char) -> c_int;
    fn pam_get_item(handle: *const Handle, item: c_int, value: *mut *const c_void) -> c_int;
    fn pam_set_data(
        handle: *mut Handle,
        name: *const c_char,
        data: *mut c_void,
        cleanup: Option<Cleanup>,
    ) -> c_int;
    fn pam_get_data(handle: *const Handle, name: *const c_char, data: *mut *const c_void) -> c_int;
    fn pam_prompt(
        handle: *mut Handle,
        style: c_int,
        response: *mut *mut c_char,
        format: *const c_char,
        ...
    ) -> c_int;
}

/// Puts the process that calls it into the private root of the user who logs in.
///
/// # Safety
/// To be called by libpam, with what it gives to modules.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pam_sm_open_session(
    handle: *mut Handle,
    _flags: c_int,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let opened = guarded(|| {
        let user = user(handle).ok_or("there is no user")?;
        let service = service(handle).unwrap_or_default();
        let inside = crate::open(&user, &service, &arguments(argc, argv))?;
        keep(handle, inside)
    });
    match opened {
        Ok(()) => PAM_SUCCESS,
        Err(why) => {
            log(&format!("Login refused: {why}"));
            tell(handle, crate::TOLD);
            PAM_SESSION_ERR
        }
    }
}

/// Ends the private root that the process is in.
///
/// # Safety
/// To be called by libpam, with what it gives to modules.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pam_sm_close_session(
    handle: *mut Handle,
    _flags: c_int,
    _argc: c_int,
    _argv: *const *const c_char,
) -> c_int {
    let closed = guarded(|| {
        let mut data = ptr::null();
        // SAFETY: the handle is libpam's, the name a C string, and `data` outlives the call.
        let found = unsafe { pam_get_data(handle, KEPT.as_ptr(), &raw mut data) };
        if found == PAM_SUCCESS && !data.is_null() {
            // SAFETY: what is kept under this name is a box's (`keep`), and libpam has not dropped it, or it would not give it.
            let inside = unsafe { &*data.cast::<Inside>() };
            inside.end();
        }
        // SAFETY: as above. libpam drops what it kept.
        unsafe { pam_set_data(handle, KEPT.as_ptr(), ptr::null_mut(), None) };
        Ok(())
    });
    if closed.is_ok() { PAM_SUCCESS } else { PAM_SESSION_ERR }
}

/// Does `body`; its panic is a failure like another.
fn guarded(body: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let words = |panic: Box<dyn Any + Send>| {
        panic.downcast_ref::<&str>().map_or("the module has panicked".to_owned(), ToString::to_string)
    };
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(words(panic)))
}

fn user(handle: *mut Handle) -> Option<String> {
    let mut user = ptr::null();
    // SAFETY: the handle is libpam's, `user` outlives the call, and without a prompt libpam has one of its own.
    let found = unsafe { pam_get_user(handle, &raw mut user, ptr::null()) };
    if found == PAM_SUCCESS { text(user) } else { None }
}

fn service(handle: *mut Handle) -> Option<String> {
    let mut service = ptr::null();
    // SAFETY: the handle is libpam's, and `service` outlives the call.
    let found = unsafe { pam_get_item(handle, PAM_SERVICE, &raw mut service) };
    if found == PAM_SUCCESS { text(service.cast()) } else { None }
}

fn arguments(argc: c_int, argv: *const *const c_char) -> Vec<String> {
    let one = |n| {
        // SAFETY: libpam gives so many pointers, one behind the other.
        let place = unsafe { argv.add(n) };
        // SAFETY: as above; each is there to be read.
        text(unsafe { *place })
    };
    // One that is no text is none that is known.
    let each = 0..usize::try_from(argc).unwrap_or(0);
    each.map(|n| one(n).unwrap_or_else(|| "\u{fffd}".to_owned())).collect()
}

/// A copy of a C string of libpam's.
fn text(pointer: *const c_char) -> Option<String> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: it is one of libpam's C strings, which stays while the module runs.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().ok().map(str::to_owned)
}

/// Has libpam keep it until the session is closed, or all is over.
fn keep(handle: *mut Handle, inside: Inside) -> Result<(), String> {
    let data = Box::into_raw(Box::new(inside));
    // SAFETY: the handle is libpam's; `drop_inside` is for what is in this box.
    let kept = unsafe { pam_set_data(handle, KEPT.as_ptr(), data.cast(), Some(drop_inside)) };
    if kept == PAM_SUCCESS {
        return Ok(());
    }
    // SAFETY: libpam has not taken it, so it still is this function's.
    drop(unsafe { Box::from_raw(data) });
    Err("libpam does not keep the session".to_owned())
}

unsafe extern "C" fn drop_inside(_handle: *mut Handle, data: *mut c_void, _status: c_int) {
    if !data.is_null() {
        // SAFETY: libpam calls this once for what `keep` has given it.
        drop(unsafe { Box::from_raw(data.cast::<Inside>()) });
    }
}

/// A line for the administrator.
fn log(line: &str) {
    let line = line.replace(|c: char| c.is_control(), " ");
    if let Ok(line) = CString::new(format!("pam_memdev: {line}")) {
        // SAFETY: the format takes one C string, which outlives the call.
        unsafe { libc::syslog(libc::LOG_AUTHPRIV | libc::LOG_ERR, c"%s".as_ptr(), line.as_ptr()) };
    }
}

/// A line for the user.
fn tell(handle: *mut Handle, line: &str) {
    if let Ok(line) = CString::new(line) {
        // SAFETY: the handle is libpam's; no response is wanted; the format takes one C string, which outlives the call.
        unsafe { pam_prompt(handle, PAM_ERROR_MSG, ptr::null_mut(), c"%s".as_ptr(), line.as_ptr()) };
    }
}
